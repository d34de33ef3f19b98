// The kernels compiled for AVX-512 (F, BW, DQ, VL); build.rs passes the flags.
#define TANGELO_TABLE avx512_kernels
#define TANGELO_NAME "avx512"
#define TANGELO_TILE_ROWS 6
#define TANGELO_TILE_VECTORS 4
#include "table.inc"
