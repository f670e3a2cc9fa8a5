// The exponential of a vector of numbers. Included in the namespace of one instruction set after another, which says
// what TARGET is and brings the vectors of vector.h.

// exp(x) of numbers that are not above 0, and of NaN; below LEAST it is 0.
TARGET INLINE Float exponential(Float x) {
    constexpr float LEAST = -87.f, ROUND = 12582912;  // 1.5 * 2^23: adding it rounds to an integer
    const Float none = all(0.f), least = all(LEAST);
    const Float inside = x < least ? least : x;
    const Float shifted = plus(all(ROUND), inside, all(1.44269504f));
    const Float whole = shifted - all(ROUND);
    Float rest = plus(inside, whole, all(-0.693359375f));
    rest = plus(rest, whole, all(2.12194440e-4f));
    Float sum = all(1.9875691500e-4f);
    sum = plus(all(1.3981999507e-3f), sum, rest);
    sum = plus(all(8.3334519073e-3f), sum, rest);
    sum = plus(all(4.1665795894e-2f), sum, rest);
    sum = plus(all(1.6666665459e-1f), sum, rest);
    sum = plus(all(5.0000001201e-1f), sum, rest);
    sum = plus(rest + all(1.f), sum * rest, rest);
    const Bits power = ((Bits)shifted << 23) + (Bits)all(1.f);
    return x < least ? none : sum * (Float)power;
}
