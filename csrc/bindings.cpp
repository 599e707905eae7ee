// The Python module mesa_ext._C, whose import registers the operators. The implementations register themselves by
// device in cpu_backend.cpp and cuda_backend.cpp.
#include <torch/extension.h>
#include <torch/library.h>

#include <sstream>
#include <string>
#include <vector>

#include "schemas.h"

#ifndef MESA_CUDA_ARCHS
#define MESA_CUDA_ARCHS ""  // what the kernels were compiled for, separated by spaces, commas or semicolons
#endif

#ifdef MESA_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

TORCH_LIBRARY(mesa_ext, m) {
    m.set_python_module("mesa_ext.ops");  // where the fake kernels live
    mesa::define_operators(m);
}

namespace {

std::vector<std::string> split(std::string text) {
    for (char& c : text)
        if (c == ',' || c == ';') c = ' ';
    std::istringstream words(text);
    std::vector<std::string> result;
    for (std::string word; words >> word;) result.push_back(word);
    return result;
}

std::string compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#else
    return "g++ " __VERSION__;
#endif
}

// How this binary was built: torch_version, cuda, cuda_version, archs, compiler.
pybind11::dict build_info() {
    pybind11::dict info;
    info["torch_version"] = TORCH_VERSION;
#ifdef MESA_WITH_CUDA
    info["cuda"] = true;
    info["cuda_version"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
#else
    info["cuda"] = false;
    info["cuda_version"] = "";
#endif
    info["archs"] = split(MESA_CUDA_ARCHS);
    info["compiler"] = compiler();
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled operators of mesa_ext; importing this module registers torch.ops.mesa_ext.*";
    m.def("build_info", &build_info, "How this binary was built, as a dict.");
}
