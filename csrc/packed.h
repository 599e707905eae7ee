// The packed layout of the symmetric H of a head: tiles of 16 x 16, those on and above the diagonal, row after row. The
// last ones are padded with zeros.
#pragma once

#include <cstdint>

#include "cg.h"

namespace mesa {

constexpr int kTile = 16;

MESA_HOST_DEVICE int64_t tile_rows(int64_t K) { return (K + kTile - 1) / kTile; }
MESA_HOST_DEVICE int64_t packed_tiles(int64_t K) { return tile_rows(K) * (tile_rows(K) + 1) / 2; }
// Number of the tile in row i and column j >= i.
MESA_HOST_DEVICE int64_t packed_tile(int64_t K, int64_t i, int64_t j) { return i * (2 * tile_rows(K) - i - 1) / 2 + j; }

}  // namespace mesa
