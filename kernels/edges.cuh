// Edges of a bipartite matching, for kernels that merge along the best; of one row of the batch, blockIdx.y.
#include "pairs.cuh"

// best[a], partner[a]: the most similar b of every a; blockIdx.x is the tile of A. Every thread has to call it.
__device__ inline void best_edges(Units a, Units b, int channels, const float *size, float *best, int *partner) {
  Best seen[EACH];
  auto score = [=](int row, int column, float cosine) {
    bool padding = size[b.token(column)] == 0;
    return size[a.token(row)] == 0 ? float(padding) : cosine - MISMATCH * padding;  // padding: the first b of its kind
  };
  all_pairs(a, b, channels, score, seen);
  for (int e = 0; e < EACH; e++) {
    int row = row_to_write(e, a.count);
    if (row < 0) continue;
    best[row] = size[a.token(row)] == 0 ? INF : seen[e].score;
    partner[row] = seen[e].index;
  }
}

// The three outputs, of the tokens a(0), ..., a(count - 1) with the ranks of their edges, and b(0), ..., b(others - 1):
// every thread places one token of the prefix, of A and of B. Every thread has to call it.
template <class A, class B>
__device__ void place_edges(
    A a, int count, B b, int others, const int *rank, const int *partner, int r, int prefix, Index *keep, Index *drop,
    Index *dest) {
  int i = blockIdx.x * BLOCK + threadIdx.x;
  int before = count_where(
      count, [=](int j) { return rank[j]; }, [=](int place, int j) { return j < i && place >= r; });
  if (i < prefix) keep[i] = i;
  if (i < others) keep[prefix + count - r + i] = b(i);
  if (i >= count) return;
  if (rank[i] < r)
    drop[rank[i]] = a(i), dest[rank[i]] = prefix + count - r + partner[i];
  else
    keep[prefix + before] = a(i);
}
