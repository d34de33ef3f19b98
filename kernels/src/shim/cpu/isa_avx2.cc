// The kernels compiled for AVX2 and FMA; build.rs passes the flags.
#define TANGELO_TABLE avx2_kernels
#define TANGELO_NAME "avx2"
#define TANGELO_TILE_ROWS 6
#define TANGELO_TILE_VECTORS 1
#include "table.inc"
