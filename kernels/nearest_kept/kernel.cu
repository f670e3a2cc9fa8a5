// The most similar kept token of every dropped one, without the matrix of cosines; see reference.py.
#include "norms.cuh"
#include "pairs.cuh"

// A grid of [tiles of dropped tokens, batch].
extern "C" __global__ void __launch_bounds__(BLOCK) nearest(
    const Scalar *metric, const float *inverse, const Index *keep, const Index *drop, int tokens, int channels,
    int kept, int r, int prefix, Index *dest) {
  metric += Index(blockIdx.y) * tokens * channels, inverse += Index(blockIdx.y) * tokens;
  Units a{r, metric, inverse, channels, 0, 1, drop + Index(blockIdx.y) * r};
  Units b{kept - prefix, metric, inverse, channels, 0, 1, keep + Index(blockIdx.y) * kept + prefix};
  Best seen[EACH];
  all_pairs(a, b, channels, [](int, int, float cosine) { return cosine; }, seen);
  for (int e = 0; e < EACH; e++) {
    int row = row_to_write(e, r);
    if (row >= 0) dest[Index(blockIdx.y) * r + row] = prefix + seen[e].index;
  }
}
