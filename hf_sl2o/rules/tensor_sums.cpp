// Sums over whole tensors that a step of a rule begins with, in one pass over what is kept of their coordinates.
//
// Sixteen lanes add a part of a tensor in fp32; the parts are added in fp64 and in their order, so that the number of
// threads changes no bit.

#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

extern "C" {
// A vector of N numbers, fp32 `stride` apart, or bf16 side by side. The same as `_Vector` in kernel.py.
struct Vector {
    const void* numbers;
    int64_t stride, is_bf16;
};
}

namespace {

constexpr int LANES = 16;
constexpr int64_t CHUNK = 1 << 13;  // coordinates that a thread takes at once
constexpr int MOST_VECTORS = 32;

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

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

// Numbers i to i + count, of at most 16; 0 in the other lanes.
inline vec load(const Vector& from, int64_t i, int count) {
    vec x{};
    if (from.is_bf16) {
        halves h{};
        std::memcpy(&h, static_cast<const uint16_t*>(from.numbers) + i, sizeof(uint16_t) * count);
        words w = __builtin_convertvector(h, words) << 16;
        std::memcpy(&x, &w, sizeof(x));
        return x;
    }
    const float* numbers = static_cast<const float*>(from.numbers) + i * from.stride;
    if (from.stride == 1 && count == LANES)
        std::memcpy(&x, numbers, sizeof(x));
    else
        for (int l = 0; l < count; l++) x[l] = numbers[l * from.stride];
    return x;
}

// Over a part of one tensor: the sum of g^2, of v, and for each vector a of g a and a^2.
void sums_of(const Vector& g, const Vector& v, const Vector* vectors, int64_t count, const Part& part, double* to) {
    vec sums[2 + 2 * MOST_VECTORS];
    for (int64_t k = 0; k < 2 + 2 * count; k++) sums[k] = vec{};
    for (int64_t i = part.first; i < part.end; i += LANES) {
        const int lanes = part.end - i < LANES ? int(part.end - i) : LANES;
        vec x = load(g, i, lanes);
        sums[0] += x * x;
        sums[1] += load(v, i, lanes);
        for (int64_t k = 0; k < count; k++) {
            vec a = load(vectors[k], i, lanes);
            sums[2 + 2 * k] += x * a;
            sums[3 + 2 * k] += a * a;
        }
    }
    for (int64_t k = 0; k < 2 + 2 * count; k++)
        for (int l = 0; l < LANES; l++) to[k] += sums[k][l];
}

}  // namespace

// Writes of each tensor the sum of g^2 to to[0], of v to to[1], and of each vector a the sum of g a to to[2 + 2 k], and
// of a^2 to to[3 + 2 k]. Returns 0, or 1 where nothing was done: no memory, or too many vectors.
extern "C" int tensor_sums(const float* g, const float* v, const Vector* vectors, int64_t count, const int64_t* sizes,
                           int64_t tensors, int64_t threads, double* const* to) {
    if (count > MOST_VECTORS) return 1;
    try {
        const std::vector<Part> parts = parts_of(sizes, tensors);
        const int64_t width = 2 + 2 * count;
        std::vector<double> of_parts(parts.size() * width);
        in_threads(parts.size(), threads, [&](size_t p) {
            sums_of({g, 1, 0}, {v, 1, 0}, vectors, count, parts[p], of_parts.data() + p * width);
        });
        for (int64_t k = 0; k < width; k++) {
            for (int64_t t = 0; t < tensors; t++) to[k][t] = 0;
            for (size_t p = 0; p < parts.size(); p++) to[k][parts[p].tensor] += of_parts[p * width + k];
        }
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
