// Rows copied in the widest words that fit; see reference.py.
#include "shared.cuh"

struct __align__(16) Quad {
  unsigned words[4];
};

template <class Word>
__device__ void copy_row(const void *from, void *to, Index source, Index target, int words) {
  for (int word = threadIdx.x % WARP; word < words; word += WARP)
    ((Word *)to)[target * words + word] = ((const Word *)from)[source * words + word];
}

// y[b, outer, k] = x[b, outer, index[b, k]], rows of `bytes`; a warp per row, a grid of [rows / warps, batch]. `rows` of
// x are 0 when one row of the batch is shared by all.
extern "C" __global__ void __launch_bounds__(BLOCK) gather(
    const void *x, const Index *index, int rows, int outer, int tokens, int kept, int bytes, void *y) {
  Index row = Index(blockIdx.x) * (BLOCK / WARP) + threadIdx.x / WARP;
  if (row >= Index(outer) * kept) return;
  Index token = index[Index(blockIdx.y) * kept + row % kept];
  Index source = (Index(blockIdx.y) * rows + row / kept) * tokens + token, target = Index(blockIdx.y) * outer * kept + row;
  unsigned long long fits = (unsigned long long)x | (unsigned long long)y | bytes | sizeof(Quad);
  int width = int(fits & -fits), words = bytes / width;
  switch (width) {
    case 16: return copy_row<Quad>(x, y, source, target, words);
    case 8: return copy_row<unsigned long long>(x, y, source, target, words);
    case 4: return copy_row<unsigned>(x, y, source, target, words);
    case 2: return copy_row<unsigned short>(x, y, source, target, words);
    default: return copy_row<unsigned char>(x, y, source, target, words);
  }
}
