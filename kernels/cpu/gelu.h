// GELU. Included in the namespace of one instruction set after another, which says what TARGET is and brings Float, all
// and plus of vector.h, or numbers that have the same operators.

// sign(z) f(|z|) as z P(z^2) / Q(z^2), and 1 beyond `end`; to 2e-8 of it (fitted by weighted least squares).
struct Rational {
    float p[6], q[6], end;
};
constexpr Rational ERF = {{1.1283791439f, 0.19154061385f, 0.052873941860f, 3.8076850295e-3f, 2.8466727726e-4f, 2.0258572147e-6f},
                          {1.f, 0.50308112771f, 0.11455541542f, 0.015054142279f, 1.1705919959e-3f, 3.7830197860e-5f},
                          3.95f};
constexpr Rational TANH = {{0.99999997961f, 0.13380981037f, 3.4955344394e-3f, 2.0608184343e-5f, 1.3353414125e-8f, 0.f},
                           {1.f, 0.46714296691f, 0.025876779624f, 3.2855462189e-4f, 7.7760472570e-7f, 0.f},
                           9.f};

TARGET INLINE Float ratio(const Rational& f, Float z, Float square) {
    Float p = all(f.p[5]), q = all(f.q[5]);
    UNROLL for (int i = 4; i >= 0; --i) {
        p = plus(all(f.p[i]), p, square);
        q = plus(all(f.q[i]), q, square);
    }
    return z * p / q;
}

// x times the normal distribution's share below it: EXACT, or by the formula with a hyperbolic tangent.
template <bool EXACT>
TARGET INLINE Float gelu(Float x) {
    constexpr Rational F = EXACT ? ERF : TANH;
    const Float none = all(0.f);
    const Float z = EXACT ? x * all(0.70710678118654752f)
                          : x * plus(all(0.79788456080286536f), all(0.035677408136300125f), x * x);
    const Float half = x * all(0.5f), square = z * z;
    const Float within = plus(half, half, ratio(F, z, square)), beyond = x > none ? x : none;
    return square > all(F.end * F.end) ? beyond : within;
}
