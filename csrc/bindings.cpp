// Operator schemas and the Python module mesa_ext._C, whose import registers them. The implementations register
// themselves by device in cpu_backend.cpp and cuda_backend.cpp.
#include <torch/extension.h>
#include <torch/library.h>

#include <sstream>
#include <string>
#include <vector>

#ifndef MESA_CUDA_ARCHS
#define MESA_CUDA_ARCHS ""  // what the kernels were compiled for, separated by spaces, commas or semicolons
#endif

#ifdef MESA_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

TORCH_LIBRARY(mesa_ext, m) {
    m.set_python_module("mesa_ext.ops");  // where the fake kernels live
    // o; x if `solution`; h_kk and h_kv if `final_state`; steps and bound if `solver_info`.
    m.def(
        "chunk_forward(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor lamb, Tensor? h_kk, Tensor? h_kv, "
        "Tensor? cu_seqlens, int max_cg_iterations, float cg_tol, bool solution=True, bool final_state=True, "
        "bool solver_info=True, Tensor? state_at=None) -> Tensor[]");
    // dq, dk, dv, dg, dbeta, dlamb; dh_kk and dh_kv if there are h_kk and h_kv.
    m.def(
        "chunk_backward(Tensor do, Tensor? dh_kk_final, Tensor? dh_kv_final, Tensor q, Tensor k, Tensor v, Tensor g, "
        "Tensor beta, Tensor lamb, Tensor? h_kk, Tensor? h_kv, Tensor? cu_seqlens, Tensor x, int max_cg_iterations, "
        "float cg_tol) -> Tensor[]");
    m.def(
        "decode_step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor lamb, Tensor(a!) h_kk, "
        "Tensor(b!) h_kv, Tensor? state_indices, int max_cg_iterations, float cg_tol, Tensor(c!) out) -> ()");
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
