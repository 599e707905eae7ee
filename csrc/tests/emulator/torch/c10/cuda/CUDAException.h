// In the place of PyTorch's header of this name.
#pragma once

#include <c10/util/Exception.h>

#define C10_CUDA_CHECK(call)                                                                  \
    do {                                                                                      \
        const cudaError_t status = (call);                                                    \
        TORCH_CHECK(status == cudaSuccess, #call, " failed with status ", int(status));       \
    } while (0)
