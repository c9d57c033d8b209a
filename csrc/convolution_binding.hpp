#pragma once
#include <nanobind/nanobind.h>

void bind_convolution(nanobind::module_& m);
