// Size-weighted merging: a warp per kept token gathers what joins it, so no sum depends on the order of threads.
#include "shared.cuh"

constexpr int CHANNELS = 8;  // of a lane at a time

// visit(j) for every drop j that joins `slot`, ascending; for a whole warp.
template <class Visit>
__device__ void each_drop(const Index *dest, int r, int slot, Visit visit) {
  for (int start = 0; start < r; start += WARP) {
    int j = start + threadIdx.x % WARP;
    unsigned joining = __ballot_sync(ALL, j < r && dest[j] == slot);
    for (; joining; joining &= joining - 1) visit(start + __ffs(joining) - 1);
  }
}

// A grid of [kept / warps of a block, batch].
extern "C" __global__ void __launch_bounds__(BLOCK) merge(
    const Scalar *x, const float *size, const Index *keep, const Index *drop, const Index *dest, int tokens,
    int channels, int kept, int r, Scalar *merged, float *new_size) {
  int slot = blockIdx.x * (BLOCK / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
  if (slot >= kept) return;
  Index row = blockIdx.y;
  x += row * tokens * channels, size += row * tokens, drop += row * r, dest += row * r;
  merged += (row * kept + slot) * channels;
  int own = int(keep[row * kept + slot]);
  float joined = 0;
  each_drop(dest, r, slot, [&](int j) { joined += size[drop[j]]; });
  float total = size[own] + joined, scale = 1 / fmaxf(total, TINY);
  if (!lane) new_size[row * kept + slot] = total;
  for (int from = 0; from < channels; from += WARP * CHANNELS) {
    float sum[CHANNELS];
    auto add = [&](int token, float weight, bool first) {
      for (int i = 0; i < CHANNELS; i++) {
        int channel = from + i * WARP + lane;
        float part = channel < channels ? weight * to_float(x[Index(token) * channels + channel]) : 0;
        sum[i] = first ? part : sum[i] + part;
      }
    };
    add(own, size[own] * scale, true);
    each_drop(dest, r, slot, [&](int j) { add(int(drop[j]), size[drop[j]] * scale, false); });
    for (int i = 0; i < CHANNELS; i++) {
      int channel = from + i * WARP + lane;
      if (channel < channels) store(merged + channel, sum[i]);
    }
  }
}
