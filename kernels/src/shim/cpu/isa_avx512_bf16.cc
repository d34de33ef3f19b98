// The kernels compiled for AVX-512 (F, BW, DQ, VL, BF16); build.rs passes the flags.
#define TANGELO_TABLE avx512_bf16_kernels
#define TANGELO_NAME "avx512_bf16"
#define TANGELO_TILE_ROWS 6
#define TANGELO_TILE_VECTORS 4
#include "table.inc"
