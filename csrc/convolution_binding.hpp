#pragma once
#include <nanobind/nanobind.h>

#include "convolution.hpp"

// Raises for numbers that are no window's.
bitbell::Window window_from(nanobind::dict from);
void bind_convolution(nanobind::module_& m);
