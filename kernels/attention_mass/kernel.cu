// What every slot is attended to, without the matrix of weights: the logits are computed twice, first for the maximum
// and the sum of every query, then for the sums over queries. See reference.py.
#include "pairs.cuh"

// The maximum of the logits, and the sum of their exponentials less it.
struct Softmax {
  float top = -INF, sum = 0;

  __device__ void see(float logit, int) { take(logit, 1); }
  __device__ void join(int lanes) {
    float other = __shfl_xor_sync(ALL, top, lanes), part = __shfl_xor_sync(ALL, sum, lanes);
    take(other, part);
  }
  __device__ void take(float other, float part) {
    if (other == -INF) return;
    float high = fmaxf(top, other);
    sum = (top == -INF ? 0 : sum * expf(top - high)) + part * expf(other - high);
    top = high;
  }
};

// top, sum [batch, heads, queries]; a grid of [tiles of queries, batch * heads].
extern "C" __global__ void __launch_bounds__(BLOCK, 2) normalizers(
    const Scalar *query, const Scalar *key, const bool *mask, int heads, int key_heads, int mask_heads, int queries,
    int slots, int channels, float scale, float *top, float *sum) {
  int row = blockIdx.y / heads, head = blockIdx.y % heads;
  mask += (Index(row) * mask_heads + head % mask_heads) * queries * slots;
  Scaled rows{queries, query + Index(blockIdx.y) * queries * channels, channels, scale};
  Scaled columns{slots, key + (Index(row) * key_heads + head / (heads / key_heads)) * slots * channels, channels, 1};
  Softmax seen[EACH];
  auto score = [=](int i, int slot, float logit) { return mask[Index(i) * slots + slot] ? logit : -INF; };
  all_pairs(rows, columns, channels, score, seen);
  for (int e = 0; e < EACH; e++) {
    int i = row_to_write(e, queries);
    if (i < 0) continue;
    top[Index(blockIdx.y) * queries + i] = seen[e].top;
    sum[Index(blockIdx.y) * queries + i] = seen[e].sum;
  }
}

// mass [batch, key heads, slots]; a grid of [tiles of slots, batch * key heads].
extern "C" __global__ void __launch_bounds__(BLOCK, 2) masses(
    const Scalar *query, const Scalar *key, const bool *mask, const Index *positions, const float *top,
    const float *sum, int heads, int key_heads, int mask_heads, int queries, int slots, int channels, float scale,
    float *mass) {
  int row = blockIdx.y / key_heads, each = heads / key_heads, first = row * heads + blockIdx.y % key_heads * each;
  positions += Index(row) * queries;
  Scaled rows{slots, key + Index(blockIdx.y) * slots * channels, channels, 1};
  Sum seen[EACH];
  for (int head = first; head < first + each; head++) {
    const bool *sees = mask + (Index(row) * mask_heads + (head - row * heads) % mask_heads) * queries * slots;
    const float *high = top + Index(head) * queries, *total = sum + Index(head) * queries;
    Scaled columns{queries, query + Index(head) * queries * channels, channels, scale};
    auto weight = [=](int slot, int i, float logit) {
      return positions[i] >= 0 && sees[Index(i) * slots + slot] ? expf(logit - high[i]) / total[i] : 0;
    };
    Sum part[EACH];
    all_pairs(rows, columns, channels, weight, part);
    for (int e = 0; e < EACH; e++) seen[e].total += part[e].total;
  }
  for (int e = 0; e < EACH; e++) {
    int slot = row_to_write(e, slots);
    if (slot >= 0) mass[Index(blockIdx.y) * slots + slot] = seen[e].total;
  }
}
