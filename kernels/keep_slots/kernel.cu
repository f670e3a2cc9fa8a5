// Which slots of a cache survive; see reference.py. blockIdx.y is the row of the batch and the head.
#include "shared.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK)
    priorities(const Scalar *score, const bool *used, int heads, int slots, int sinks, int recent, float *priority) {
  int i = blockIdx.x * BLOCK + threadIdx.x;
  score += Index(blockIdx.y) * slots, priority += Index(blockIdx.y) * slots;
  used += Index(blockIdx.y / heads) * slots;
  auto value = [=](int j) { return used[j]; };
  int older = count_where(slots, value, [=](bool held, int j) { return held && j < i; });
  int newer = count_where(slots, value, [=](bool held, int j) { return held && j > i; });
  if (i < slots) priority[i] = !used[i] ? -INF : older < sinks || newer < recent ? INF : to_float(score[i]);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    keep(const float *priority, const bool *used, const Index *budget, int heads, int slots, bool *kept) {
  int i = blockIdx.x * BLOCK + threadIdx.x;
  priority += Index(blockIdx.y) * slots, kept += Index(blockIdx.y) * slots;
  used += Index(blockIdx.y / heads) * slots;
  int rank = rank_of(i, slots, [=](int j) { return priority[j]; });
  int held = count_where(slots, [=](int j) { return used[j]; }, [](bool h, int) { return h; });
  if (i < slots) kept[i] = rank < held && rank < budget[blockIdx.y / heads];
}
