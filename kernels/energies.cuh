// Energies of tokens, for kernels that rank by them.
#include "norms.cuh"
#include "pairs.cuh"

// energy[i] of every unprotected token; a grid of [tiles of tokens, batch].
extern "C" __global__ void __launch_bounds__(BLOCK) energies(
    const Scalar *metric, const float *size, const float *inverse, int tokens, int channels, int prefix,
    float margin, float *energy) {
  Index start = Index(blockIdx.y) * tokens;
  metric += start * channels, size += start + prefix, inverse += start;
  int free = tokens - prefix;
  Units all{free, metric, inverse, channels, prefix};
  Sum seen[EACH];
  auto score = [=](int, int column, float cosine) {
    float x = cosine - margin;
    return size[column] > 0 ? (x > 0 ? x : expm1f(x)) : 0;
  };
  all_pairs(all, all, channels, score, seen);
  int real = count_where(free, [=](int j) { return size[j]; }, [](float s, int) { return s > 0; });
  for (int e = 0; e < EACH; e++) {
    int row = row_to_write(e, free);
    if (row >= 0) energy[Index(blockIdx.y) * free + row] = size[row] > 0 ? seen[e].total / max(real, 1) : INF;
  }
}
