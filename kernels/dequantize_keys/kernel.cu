// Keys back from 8 bits; see reference.py.
#include "shared.cuh"

// A thread per channel and group as in quantize_keys; blockIdx.y is the row of the batch and the head.
extern "C" __global__ void __launch_bounds__(BLOCK) dequantize(
    const unsigned char *codes, const float *scale, const float *zero, int slots, int channels, int group, float *x) {
  int place = blockIdx.x * BLOCK + threadIdx.x, part = place / channels, channel = place % channels;
  int first = part * group, count = min(group, slots - first), scales = slots * (channels / group);
  if (count <= 0) return;
  Index start = (Index(blockIdx.y) * slots + first) * channels + channel;
  bool whole = count == group;
  float step = whole ? scale[Index(blockIdx.y) * scales + place] : 0;
  float low = whole ? zero[Index(blockIdx.y) * scales + place] : 0;
  for (int i = 0; i < count; i++) x[start + Index(i) * channels] = codes[start + Index(i) * channels] * step + low;
}
