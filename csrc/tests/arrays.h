// Arrays on the device, for the tests.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

void check(cudaError_t status, const char* what = "CUDA") {
    if (status == cudaSuccess) return;
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
    std::exit(1);
}

template <typename T>
struct Array {
    T* data = nullptr;
    size_t count;

    // Filled with NaN patterns (all bits set): what a kernel forgets to write shows.
    explicit Array(size_t n) : count(n) {
        check(cudaMalloc(reinterpret_cast<void**>(&data), std::max<size_t>(n, 1) * sizeof(T)), "cudaMalloc");
        spoil();
    }
    explicit Array(const std::vector<T>& host) : Array(host.size()) {
        check(cudaMemcpy(data, host.data(), count * sizeof(T), cudaMemcpyHostToDevice), "copy to the device");
    }
    Array(const Array&) = delete;
    ~Array() { cudaFree(data); }

    void spoil() { check(cudaMemset(data, 0xff, count * sizeof(T)), "cudaMemset"); }

    std::vector<T> host() const {
        std::vector<T> h(count);
        check(cudaMemcpy(h.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost), "copy to the host");
        return h;
    }
    std::vector<unsigned char> bytes() const {
        std::vector<unsigned char> h(count * sizeof(T));
        check(cudaMemcpy(h.data(), data, h.size(), cudaMemcpyDeviceToHost), "copy to the host");
        return h;
    }
    std::vector<double> doubles() const {
        const std::vector<T> h = host();
        return std::vector<double>(h.begin(), h.end());
    }
};

}  // namespace
