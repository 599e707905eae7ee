// The operators for CUDA tensors, kernels and glue, on CPU tensors and the emulator: torch.ops.mesa_ext_emulated.*, for
// tests/test_emulated.py. The headers in torch/ stand before PyTorch's of the same names.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "checks.h"
#include "results.h"
#include "schemas.h"

TORCH_LIBRARY(mesa_ext_emulated, m) { mesa::define_operators(m); }

// What the glue registers itself as. PyTorch's headers use the second word too and are therefore included above.
#define mesa_ext mesa_ext_emulated
#define CUDA CPU
#include "cuda_backend.cpp"
