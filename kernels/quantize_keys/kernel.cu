// Keys in 8 bits, a scale per channel and group of slots; see reference.py for where the scales lie.
#include "shared.cuh"

// A thread per channel and group, the last of which may be no whole one; blockIdx.y is the row of the batch and the head.
extern "C" __global__ void __launch_bounds__(BLOCK)
    quantize(const float *x, int slots, int channels, int group, unsigned char *codes, float *scale, float *zero) {
  int place = blockIdx.x * BLOCK + threadIdx.x, part = place / channels, channel = place % channels;
  int first = part * group, count = min(group, slots - first), scales = slots * (channels / group);
  if (count <= 0) return;
  Index start = (Index(blockIdx.y) * slots + first) * channels + channel;
  float low = x[start], high = low;
  for (int i = 1; i < count; i++) {
    low = fminf(low, x[start + Index(i) * channels]);
    high = fmaxf(high, x[start + Index(i) * channels]);
  }
  bool whole = count == group;
  float step = (high - low) / 255;
  for (int i = 0; i < count; i++) {
    float code = rintf((x[start + Index(i) * channels] - low) / (step > 0 ? step : 1));
    codes[start + Index(i) * channels] = whole ? (unsigned char)(fminf(fmaxf(code, 0), 255)) : 0;
  }
  if (place >= scales) return;
  scale[Index(blockIdx.y) * scales + place] = whole ? step : 0;
  zero[Index(blockIdx.y) * scales + place] = whole ? low : 0;
}
