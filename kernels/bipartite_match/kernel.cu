// Bipartite soft matching without the matrix of scores; see reference.py for the meaning.
#include "norms.cuh"
#include "pairs.cuh"
#include "ranks.cuh"

// best[a], partner[a]: the most similar b of every a; a grid of [tiles of A, batch].
extern "C" __global__ void __launch_bounds__(BLOCK) best_partners(
    const Scalar *metric, const float *size, const float *inverse, int tokens, int channels, int prefix,
    float *best, int *partner) {
  Index start = Index(blockIdx.y) * tokens;
  metric += start * channels, size += start, inverse += start;
  int free = tokens - prefix;
  int odd = prefix % 2;
  Units a{(free + 1 - odd) / 2, metric, inverse, channels, prefix + odd, 2};
  Units b{(free + odd) / 2, metric, inverse, channels, prefix + 1 - odd, 2};
  Best seen[EACH];
  auto score = [=](int row, int column, float cosine) {
    bool padding = size[b.token(column)] == 0;
    return size[a.token(row)] == 0 ? float(padding) : cosine - MISMATCH * padding;  // padding: the first b of its kind
  };
  all_pairs(a, b, channels, score, seen);
  for (int e = 0; e < EACH; e++) {
    int row = row_to_write(e, a.count);
    if (row < 0) continue;
    best[Index(blockIdx.y) * a.count + row] = size[a.token(row)] == 0 ? INF : seen[e].score;
    partner[Index(blockIdx.y) * a.count + row] = seen[e].index;
  }
}

// The three outputs: every thread places one token of the prefix, of A and of B. `size` is not read: a TensorRT plugin
// knows the number of tokens by an input that has it.
extern "C" __global__ void __launch_bounds__(BLOCK)
    place(const int *rank, const int *partner, const float *size, int tokens, int r, int prefix, Index *keep, Index *drop,
          Index *dest) {
  int free = tokens - prefix, odd = prefix % 2, count = (free + 1 - odd) / 2, others = free - count;
  rank += Index(blockIdx.y) * count, partner += Index(blockIdx.y) * count;
  keep += Index(blockIdx.y) * (tokens - r), drop += Index(blockIdx.y) * r, dest += Index(blockIdx.y) * r;
  int i = blockIdx.x * BLOCK + threadIdx.x;
  int before = count_where(
      count, [=](int j) { return rank[j]; }, [=](int place, int j) { return j < i && place >= r; });
  if (i < prefix) keep[i] = i;
  if (i < others) keep[prefix + count - r + i] = prefix + 1 - odd + 2 * i;
  if (i >= count) return;
  int token = prefix + odd + 2 * i;
  if (rank[i] < r)
    drop[rank[i]] = token, dest[rank[i]] = prefix + count - r + partner[i];
  else
    keep[prefix + before] = token;
}
