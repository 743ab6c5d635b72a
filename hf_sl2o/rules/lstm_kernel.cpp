// One step of a learned rule over many coordinates on a CPU: moments, inputs, network and delta in one pass, in place.
//
// Sixteen coordinates are computed at a time, one in each lane of a vector. The formulas are those of rule.py, lstm.py
// and tensor_lstm.py, which remain what this file is tested against. No flag lets the compiler assume that numbers are
// finite: NaN and Inf go through as they do in torch. What a coordinate comes to depends neither on its neighbours nor
// on the number of threads.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

extern "C" {
// The same fields in the same order as `_Step` in kernel.py; its size is compared there.
struct Step {
    // What is kept of the N coordinates of `tensors` tensors; changed in place. g becomes delta.
    float *g, *v, *hidden, *cell, *momenta;
    void* m;
    const int64_t* sizes;      // of each tensor
    const float* of_tensor;    // (tensors, per_tensor): rounding, scale, then the cosine; or the length, and the mix
    const float* weights;      // of each layer and unit: bias, columns, hidden, each for the four gates; then the head
    const float* corrections;  // 1 / (1 - beta^t) of m, v and each further momentum
    const float* betas;        // of m, v and each further momentum
    int64_t tensors, per_tensor, threads;
    int64_t layers, size;     // of the LSTM; 0 layers: a mix of the columns instead
    int64_t further, stride;  // further momenta, and numbers that `momenta` has a coordinate
    int64_t columns;          // of the network's input
    int64_t m_is_bf16, normalized, tensor_scale, progress, agreement, squash;
    float eps, share, log_sign, log_sign_exp, cell_factor, output_scale, ceased, largest;  // log_sign 0: none
};
}

namespace {

constexpr int LANES = 16;
constexpr int64_t CHUNK = 1 << 13;  // coordinates that a thread takes at once
constexpr int MOST_COLUMNS = 32, MOST_UNITS = 64;
constexpr float TINY = 1.17549435e-38f;

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

template <class To, class From> inline To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

inline vec all(float x) { return vec{} + x; }
// NaN goes through all three, as through clamp and maximum of torch.
inline vec at_least(vec x, float low) { return x < all(low) ? all(low) : x; }
inline vec at_most(vec x, float high) { return x > all(high) ? all(high) : x; }
inline vec larger(vec a, vec b) { return ((a >= b) | (a != a)) ? a : b; }
inline vec magnitude(vec x) { return bits<vec>(bits<ints>(x) & 0x7fffffff); }

inline vec root(vec x) {
    vec y;
    for (int l = 0; l < LANES; l++) y[l] = std::sqrt(x[l]);
    return y;
}

// exp(x) = scale * (1 + rest), with scale a power of 2 and |log(1 + rest)| <= log(2) / 2. The polynomial is that of
// expf in Cephes. For |x| <= 88.
struct Exp {
    vec scale, rest;
};

inline Exp exp_parts(vec x) {
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the lowest bits
    vec t = x * 1.44269504088896341f + shift;
    vec k = t - shift;
    vec r = x - k * 0.693359375f;
    r = r + k * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r;
    return {bits<vec>((bits<words>(t) + 127u) << 23), p};
}

// 1 + exp(-x): the sigmoid of x is one over it.
inline vec sigmoid_below(vec x) {
    Exp e = exp_parts(at_most(at_least(-x, -87.0f), 88.0f));
    return (e.scale + 1.0f) + e.scale * e.rest;
}

// exp(2 x) - 1, exact near 0: tanh x is it over itself plus 2. From |x| = 10 on tanh is 1 in fp32.
inline vec tanh_above(vec x) {
    Exp e = exp_parts(at_most(at_least(x + x, -20.0f), 20.0f));
    return (e.scale - 1.0f) + e.scale * e.rest;
}

inline vec tanh_of(vec x) {
    vec above = tanh_above(x);
    return above / (above + 2.0f);
}

// Logarithm of a normal positive number (Cephes' logf); Inf and NaN stay.
inline vec log_of(vec x) {
    ints b = bits<ints>(x);
    ints e = (b - 0x3f3504f3) >> 23;  // the mantissa is between sqrt(1/2) and sqrt(2)
    vec z = bits<vec>(b - (e << 23)) - 1.0f;
    vec k = __builtin_convertvector(e, vec);
    vec p = z * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * z + 1.1676998740e-1f;
    p = p * z - 1.2420140846e-1f;
    p = p * z + 1.4249322787e-1f;
    p = p * z - 1.6668057665e-1f;
    p = p * z + 2.0000714765e-1f;
    p = p * z - 2.4999993993e-1f;
    p = p * z + 3.3333331174e-1f;
    vec zz = z * z;
    vec y = p * z * zz - k * 2.12194440e-4f;
    y = y - zz * 0.5f;
    return x < all(INFINITY) ? (z + y) + k * 0.693359375f : x;
}

// torch.lerp(g, old, beta), with its two forms.
inline vec lerp(vec g, vec old, float beta) {
    return beta < 0.5f ? g + (old - g) * beta : old + (old - g) * (beta - 1.0f);
}

// The first `count` of 16 numbers, `stride` apart.
template <bool FULL> inline vec load(const float* from, int64_t stride, int count) {
    vec x{};
    if (FULL && stride == 1) {
        std::memcpy(&x, from, sizeof(x));
        return x;
    }
    for (int l = 0; l < (FULL ? LANES : count); l++) x[l] = from[l * stride];
    return x;
}

template <bool FULL> inline void store(float* to, int64_t stride, int count, vec x) {
    if (FULL && stride == 1) {
        std::memcpy(to, &x, sizeof(x));
        return;
    }
    for (int l = 0; l < (FULL ? LANES : count); l++) to[l * stride] = x[l];
}

inline vec load_bf16(const uint16_t* from, int count) {
    halves x{};
    std::memcpy(&x, from, sizeof(uint16_t) * count);
    return bits<vec>(__builtin_convertvector(x, words) << 16);
}

// Rounds to nearest, ties to even, as torch does.
inline void store_bf16(uint16_t* to, int count, vec x) {
    words b = bits<words>(x);
    words rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    rounded = x != x ? words{} + 0x7fc0u : rounded;
    halves y = __builtin_convertvector(rounded, halves);
    std::memcpy(to, &y, sizeof(uint16_t) * count);
}

// The even and odd numbers of two vectors, and the way back.
#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, ints{__VA_ARGS__})
#endif
inline vec even(vec a, vec b) { return PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30); }
inline vec odd(vec a, vec b) { return PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31); }
inline vec low(vec a, vec b) { return PICK(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23); }
inline vec high(vec a, vec b) { return PICK(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31); }

// In memory the eight units of a coordinate lie together; here a vector holds one unit of 16 coordinates. Taking even
// and odd numbers apart turns the bits of an index by one place, so three turns transpose.
inline void load_8_units(vec* to, const float* from) {
    vec a[8], b[8];
    std::memcpy(a, from, sizeof(a));
    for (int turn = 0; turn < 3; turn++) {
        for (int r = 0; r < 4; r++) b[r] = even(a[2 * r], a[2 * r + 1]), b[r + 4] = odd(a[2 * r], a[2 * r + 1]);
        for (int r = 0; r < 8; r++) a[r] = b[r];
    }
    for (int r = 0; r < 8; r++) to[r] = a[r];
}

inline void store_8_units(float* to, const vec* from) {
    vec a[8], b[8];
    for (int r = 0; r < 8; r++) a[r] = from[r];
    for (int turn = 0; turn < 3; turn++) {
        for (int r = 0; r < 4; r++) b[2 * r] = low(a[r], a[r + 4]), b[2 * r + 1] = high(a[r], a[r + 4]);
        for (int r = 0; r < 8; r++) a[r] = b[r];
    }
    std::memcpy(to, a, sizeof(a));
}

// What 16 coordinates see; returns how many columns there are.
inline int see(const Step& s, const float* of, const vec* averages, vec g, vec inverse, vec* x) {
    int k = 0;
    if (s.normalized) {
        x[k++] = averages[0] * inverse;
        x[k++] = g * inverse;
        for (int64_t j = 0; j < s.further; j++) x[k++] = averages[1 + j] * inverse;
        if (s.tensor_scale) {
            x[k++] = averages[0] / of[1];
            x[k++] = g / of[1];
        }
    } else {
        x[k++] = g;
    }
    if (s.log_sign > 0) {
        for (int i = k - 1; i >= 0; i--) {
            vec seen = x[i];
            x[2 * i] = at_least(log_of(at_least(magnitude(seen), 1e-37f)) / s.log_sign, -1.0f);
            x[2 * i + 1] = at_most(at_least(seen * s.log_sign_exp, -1.0f), 1.0f);
        }
        k *= 2;
    }
    if (s.progress) x[k++] = all(s.share);
    if (s.agreement) x[k++] = all(of[2]);
    return k;
}

// The four gates of unit j, before their nonlinearities.
template <int UNITS>
inline void gates(const float* w, const vec* x, int columns, const vec* hidden, int size, vec* gate) {
    for (int q = 0; q < 4; q++) gate[q] = all(w[q]);
    w += 4;
    for (int k = 0; k < columns; k++, w += 4)
        for (int q = 0; q < 4; q++) gate[q] += x[k] * w[q];
    for (int k = 0; k < (UNITS ? UNITS : size); k++, w += 4)
        for (int q = 0; q < 4; q++) gate[q] += hidden[k] * w[q];
}

// The LSTM's layers and its head, for coordinates from i on; x holds the columns.
template <bool FULL, int UNITS> inline vec network(const Step& s, vec* x, int columns, int64_t i, int count) {
    const int size = UNITS ? UNITS : int(s.size);
    const int64_t stride = s.layers * size;
    const float* w = s.weights;
    vec hidden[UNITS ? UNITS : MOST_UNITS], cell[UNITS ? UNITS : MOST_UNITS], next[UNITS ? UNITS : MOST_UNITS];
    const vec* seen = x;
    vec below[UNITS ? UNITS : MOST_UNITS];
    for (int64_t layer = 0; layer < s.layers; layer++) {
        float *h = s.hidden + i * stride + layer * size, *c = s.cell + i * stride + layer * size;
        const bool whole = FULL && UNITS == 8 && s.layers == 1;
        if (whole) {
            load_8_units(hidden, h);
            load_8_units(cell, c);
        } else {
            for (int j = 0; j < size; j++) hidden[j] = load<FULL>(h + j, stride, count);
            for (int j = 0; j < size; j++) cell[j] = load<FULL>(c + j, stride, count);
        }
        for (int j = 0; j < size; j++, w += 4 * (1 + columns + size)) {
            vec gate[4];  // input, forget, new, output
            gates<UNITS>(w, seen, columns, hidden, size, gate);
            vec above = tanh_above(gate[2]);
            vec kept = cell[j] * s.cell_factor / sigmoid_below(gate[1]);
            cell[j] = kept + above / (sigmoid_below(gate[0]) * (above + 2.0f));
            above = tanh_above(cell[j]);
            next[j] = above / (sigmoid_below(gate[3]) * (above + 2.0f));
        }
        if (whole) {
            store_8_units(h, next);
            store_8_units(c, cell);
        } else {
            for (int j = 0; j < size; j++) store<FULL>(h + j, stride, count, next[j]);
            for (int j = 0; j < size; j++) store<FULL>(c + j, stride, count, cell[j]);
        }
        for (int j = 0; j < size; j++) below[j] = next[j];
        seen = below;
        columns = size;
    }
    vec output{};
    for (int j = 0; j < size; j++) output += next[j] * w[j];
    return s.squash ? tanh_of(output) : output;
}

// 16 coordinates from i on, or the first `count` of them, of one tensor.
template <bool FULL, int UNITS> inline void block(const Step& s, const float* of, int64_t i, int count) {
    vec g = load<FULL>(s.g + i, 1, count);
    vec v = lerp(g * g, load<FULL>(s.v + i, 1, count), s.betas[1]);
    store<FULL>(s.v + i, 1, count, v);
    vec v_hat = v * s.corrections[1];
    vec inverse = 1.0f / (root(v_hat) + s.eps);

    vec m;
    if (s.m_is_bf16) {
        uint16_t* kept = static_cast<uint16_t*>(s.m) + i;
        m = lerp(g, load_bf16(kept, FULL ? LANES : count), s.betas[0]);
        store_bf16(kept, FULL ? LANES : count, m);
    } else {
        float* kept = static_cast<float*>(s.m) + i;
        m = lerp(g, load<FULL>(kept, 1, count), s.betas[0]);
        store<FULL>(kept, 1, count, m);
    }
    vec averages[MOST_COLUMNS];  // with their bias corrected
    averages[0] = m * s.corrections[0];
    for (int64_t j = 0; j < s.further; j++) {
        float* kept = s.momenta + i * s.stride + j;
        vec average = lerp(g, load<FULL>(kept, s.stride, count), s.betas[2 + j]);
        store<FULL>(kept, s.stride, count, average);
        averages[1 + j] = average * s.corrections[2 + j];
    }

    vec x[2 * MOST_COLUMNS];
    int columns = see(s, of, averages, g, inverse, x);
    vec output{};
    if (s.layers) {
        output = network<FULL, UNITS>(s, x, columns, i, count);
    } else {
        for (int k = 0; k < columns; k++) output += x[k] * of[3 + k];
        output = of[2] * s.largest * tanh_of(output / s.largest);
    }

    // No gradient so far, no movement; and none when it has ceased.
    vec history = v_hat / at_least(v_hat + of[0], TINY);
    vec recent = larger(magnitude(averages[0] * inverse), magnitude(g * inverse));
    history = history * at_most(recent / s.ceased, 1.0f);
    vec delta = s.output_scale * history * output;
    store<FULL>(s.g + i, 1, count, delta);
    if (s.stride > s.further) {  // the way from the start
        float* way = s.momenta + i * s.stride + s.stride - 1;
        store<FULL>(way, s.stride, count, load<FULL>(way, s.stride, count) - delta);
    }
}

struct Part {
    int64_t tensor, first, end;
};

std::vector<Part> parts_of(const int64_t* sizes, int64_t tensors) {
    std::vector<Part> parts;
    int64_t first = 0;
    for (int64_t t = 0; t < tensors; first += sizes[t++])
        for (int64_t i = 0; i < sizes[t]; i += CHUNK)
            parts.push_back({t, first + i, first + (i + CHUNK < sizes[t] ? i + CHUNK : sizes[t])});
    return parts;
}

// Does `work` for each number below `count`, in some threads.
template <class Work> void in_threads(size_t count, int64_t threads, const Work& work) {
    std::atomic<size_t> next{0};
    auto run = [&] {
        for (size_t p = next++; p < count; p = next++) work(p);
    };
    std::vector<std::thread> others;
    others.reserve(threads);
    try {
        for (int64_t t = 1; t < threads && size_t(t) < count; t++) others.emplace_back(run);
    } catch (const std::system_error&) {  // no more threads are allowed: those there are do it
    }
    run();
    for (std::thread& other : others) other.join();
}

template <int UNITS> void work(const Step& s, const Part& part) {
    const float* of = s.of_tensor + part.tensor * s.per_tensor;
    int64_t i = part.first;
    for (; i + LANES <= part.end; i += LANES) block<true, UNITS>(s, of, i, LANES);
    if (i < part.end) block<false, UNITS>(s, of, i, int(part.end - i));
}

}  // namespace

extern "C" int64_t size_of_step() { return sizeof(Step); }

// Returns 0, or 1 where there is no memory, or the network is larger than this file knows; nothing is changed then.
extern "C" int rule_step(const Step* step) {
    const Step& s = *step;
    if (s.columns > MOST_COLUMNS || s.size > MOST_UNITS || s.further + 1 > MOST_COLUMNS) return 1;
    try {
        const std::vector<Part> parts = parts_of(s.sizes, s.tensors);
        in_threads(parts.size(), s.threads, [&](size_t p) {
            s.layers && s.size == 8 ? work<8>(s, parts[p]) : work<0>(s, parts[p]);
        });
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
