// In the place of PyTorch's header of this name: the emulator is the device.
#pragma once

#include <cstddef>

#include <cuda_runtime_api.h>

namespace at::cuda {

struct DeviceProperties {
    const char* name = "emulator";
    int major = 9, minor = 0;
    size_t sharedMemPerBlockOptin = 227 << 10;
};

inline const DeviceProperties* getCurrentDeviceProperties() {
    static const DeviceProperties properties;
    return &properties;
}

inline cudaStream_t getCurrentCUDAStream() { return nullptr; }

}  // namespace at::cuda
