// Every kernel of the CUDA device, as one unit.
#include "attention.cuh"
#include "linear.cuh"
#include "pick.cuh"
#include "rows.cuh"
