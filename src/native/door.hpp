// What the files that are called from Python share.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <stdexcept>

#include "problem.hpp"

namespace foveal {

using Address = std::uintptr_t;

template <class T>
const T* at(Address a) { return reinterpret_cast<const T*>(a); }

inline void require(bool fine, const char* what) {
  if (!fine) throw std::invalid_argument(what);
}

const Variant& current();  // the instruction set in use

void bind_linear(nanobind::module_& m);

}  // namespace foveal
