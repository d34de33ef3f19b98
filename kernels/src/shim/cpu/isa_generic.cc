// The kernels for any processor: vectors are cut to whatever the target has.
#define TANGELO_TABLE generic_kernels
#define TANGELO_NAME "generic"
#define TANGELO_TILE_ROWS 2
#define TANGELO_TILE_VECTORS 1
#include "table.inc"
