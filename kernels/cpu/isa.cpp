#include "isa.h"

#include <cstdlib>

#include "ort.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace tokopt {

namespace {

#if defined(__x86_64__) || defined(__i386__)

bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

bool has_avx_vnni() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

// A process has to ask for the memory of tiles, which the system saves with its other registers.
bool has_amx() {
#if defined(__linux__) && defined(__x86_64__)
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    unsigned a, b, c, d;
    const bool known = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 3) == 3;  // tiles, products of bytes
    return known && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}

std::vector<Isa> detect() {
    std::vector<Isa> found;
    __builtin_cpu_init();  // these also ask whether the system saves the wide registers
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vnni")) {
            if (has_amx()) found.push_back(Isa::AMX_INT8);
            found.push_back(Isa::AVX512_VNNI);
        }
        if (has_avx_vnni()) found.push_back(Isa::AVX_VNNI);
        found.push_back(Isa::AVX2);
    }
    found.push_back(Isa::PLAIN);
    return found;
}

#elif defined(__aarch64__)

std::vector<Isa> detect() {
#if defined(__linux__)
    const bool dot_product = getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
    const bool dot_product = true;
#else
    const bool dot_product = false;
#endif
    return dot_product ? std::vector<Isa>{Isa::NEON, Isa::PLAIN} : std::vector<Isa>{Isa::PLAIN};
}

#else

std::vector<Isa> detect() { return {Isa::PLAIN}; }

#endif

}  // namespace

const char* name(Isa isa) {
    static const char* const names[ISAS] = {"plain", "neon", "avx2", "avx_vnni", "avx512_vnni", "amx_int8"};
    return names[static_cast<int>(isa)];
}

const std::vector<Isa>& available() {
    static const std::vector<Isa>& found = *new std::vector<Isa>(detect());
    return found;
}

Isa chosen() {
    const char* wanted = std::getenv("TOKOPT_ISA");
    if (!wanted || !*wanted) return available().front();
    std::string offered;
    for (Isa isa : available()) {
        if (std::string(wanted) == name(isa)) return isa;
        offered += (offered.empty() ? "" : ", ") + std::string(name(isa));
    }
    throw Refused("TOKOPT_ISA=" + std::string(wanted) + " cannot be used on this processor; use one of " + offered +
                  ", or unset it.");
}

bool asks_ahead() {
#if defined(__x86_64__) || defined(__i386__)
    static const bool ahead = (__builtin_cpu_init(), !__builtin_cpu_is("amd"));
    return ahead;
#else
    return true;
#endif
}

}  // namespace tokopt
