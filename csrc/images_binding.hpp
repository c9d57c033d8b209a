#pragma once
#include <nanobind/nanobind.h>

void bind_images(nanobind::module_& m);
