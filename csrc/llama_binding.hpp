#pragma once
#include <nanobind/nanobind.h>

// Adds the class Llama and the function sample to the module.
void bind_llama(nanobind::module_& m);
