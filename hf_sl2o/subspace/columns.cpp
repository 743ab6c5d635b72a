// Products with stored directions on a CPU: project, lift and publish, over a table of all parameters in one call.
//
// A matrix is U_p^T, (rows, numel), one direction a row, read once from memory, 4096 columns at a time, so that the
// gradient or the sums of these columns stay in the first cache. Chunks are the same for any number of threads, and
// their sums are added in order: the result does not depend on the number of threads. Where directions are factored, as
// TALL WIDE beside those that are stored, a chunk is some whole rows of the matrix, or a slice of one, and both are
// done while it is in the cache.

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int64_t CHUNK = 4096;  // columns; a multiple of BLOCK
constexpr int64_t BLOCK = 128;   // columns that share a scale
constexpr int LANES = 16;

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint8_t Unsigned __attribute__((vector_size(16)));

template <class V>
inline V take(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

inline void put(float* p, Lanes v) { std::memcpy(p, &v, sizeof(v)); }

#if defined(__clang__)
#define SHUFFLED(...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(...) __builtin_shuffle(a, b, Integers{__VA_ARGS__})
#endif

inline Lanes even(Lanes a, Lanes b) { return SHUFFLED(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30); }
inline Lanes odd(Lanes a, Lanes b) { return SHUFFLED(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31); }
inline Lanes low(Lanes a, Lanes b) { return SHUFFLED(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23); }
inline Lanes high(Lanes a, Lanes b) { return SHUFFLED(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31); }

inline float of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// How the numbers of a row are stored. `lanes(row, i, half)`: of 32 numbers from column i, a multiple of 32, the first
// or second 16 in the order of the buffers; `one(row, i)`: that of column i. `scaled`: a scale for each BLOCK of columns. `paired`: in the buffers the
// even columns of each 32 come first.
struct F32 {
  static constexpr bool scaled = false, paired = false;
  static int64_t bytes(int64_t columns) { return 4 * columns; }
  static Lanes lanes(const char* row, int64_t i, int half) { return take<Lanes>(row + 4 * i + 64 * half); }
  static float one(const char* row, int64_t i) { return take<float>(row + 4 * i); }
};

struct BF16 {
  static constexpr bool scaled = false, paired = true;
  static int64_t bytes(int64_t columns) { return 2 * columns; }
  static Lanes lanes(const char* row, int64_t i, int half) {  // the even columns are the low halves of 16 integers
    Integers both = take<Integers>(row + 2 * i);
    both = half ? both & int32_t(0xFFFF0000) : both << 16;
    return take<Lanes>(&both);
  }
  static float one(const char* row, int64_t i) { return of_bits(uint32_t(take<uint16_t>(row + 2 * i)) << 16); }
};

struct Int8 {
  static constexpr bool scaled = true, paired = false;
  static int64_t bytes(int64_t columns) { return columns; }
  static Lanes lanes(const char* row, int64_t i, int half) {
    Unsigned shifted = take<Unsigned>(row + i + 16 * half) ^ 128;  // compilers widen these in one instruction, signed ones not all
    return __builtin_convertvector(__builtin_convertvector(shifted, Integers) - 128, Lanes);
  }
  static float one(const char* row, int64_t i) { return float(take<int8_t>(row + i)); }
};

// Two a byte, the even column in the low half; stored as the number plus 8.
struct Int4 {
  static constexpr bool scaled = true, paired = true;
  static int64_t bytes(int64_t columns) { return (columns + 1) / 2; }
  static Lanes lanes(const char* row, int64_t i, int half) {
    Unsigned two = take<Unsigned>(row + i / 2);
#if defined(__AVX512F__)  // a table of 16 floats, by the lowest four bits of an integer
    const Lanes table = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    __m512i both = _mm512_cvtepu8_epi32((__m128i)two);
    return (Lanes)_mm512_permutexvar_ps(half ? _mm512_srli_epi32(both, 4) : both, (__m512)table);
#else
    Unsigned one = half ? two >> 4 : two & 15;
    return __builtin_convertvector(__builtin_convertvector(one, Integers) - 8, Lanes);
#endif
  }
  static float one(const char* row, int64_t i) {
    uint8_t two = take<uint8_t>(row + i / 2);
    return float(int(i % 2 ? two >> 4 : two & 15) - 8);
  }
};

template <class S>
void reorder(float* numbers, int64_t columns) {  // to the order of the buffers
  if (!S::paired) return;
  for (int64_t i = 0; i < columns; i += 32) {
    Lanes a = take<Lanes>(numbers + i), b = take<Lanes>(numbers + i + 16);
    put(numbers + i, even(a, b));
    put(numbers + i + 16, odd(a, b));
  }
}

template <class S>
void order(float* numbers, int64_t columns) {  // and back
  if (!S::paired) return;
  for (int64_t i = 0; i < columns; i += 32) {
    Lanes a = take<Lanes>(numbers + i), b = take<Lanes>(numbers + i + 16);
    put(numbers + i, low(a, b));
    put(numbers + i + 16, high(a, b));
  }
}

// What a parameter's directions are; `scales` is (rows, blocks), or null.
struct Matrix {
  const char* codes;
  const float* scales;
  int64_t rows, numel, first;  // `first`: its first coefficient
  const float* wide;           // (r, q) in the order of the buffers, q a multiple of BLOCK; null: no factors
  int64_t r, q;

  int64_t blocks() const { return (numel + BLOCK - 1) / BLOCK; }
  int64_t slices() const { return (q + CHUNK - 1) / CHUNK; }  // of a row of a factored matrix
  bool sliced() const { return r && q > CHUNK; }
  int64_t step() const { return r ? CHUNK / q * q : CHUNK; }  // columns of a chunk that is not a slice
  int64_t chunks() const { return sliced() ? numel / q * slices() : (numel + step() - 1) / step(); }
  int64_t start(int64_t chunk) const {
    return sliced() ? chunk / slices() * q + chunk % slices() * CHUNK : chunk * step();
  }
  int64_t columns(int64_t chunk) const {
    const int64_t end = sliced() ? (chunk / slices() + 1) * q : numel, most = sliced() ? CHUNK : step();
    return end - start(chunk) < most ? end - start(chunk) : most;
  }
};

template <class S>
float scale_at(const Matrix& m, int64_t row, int64_t column) {
  return S::scaled ? m.scales[row * m.blocks() + column / BLOCK] : 1.0f;
}

// out[r] = <row r of these columns, g>; g in the order of the buffers up to `whole`, a multiple of 32.
template <class S, int N>
void dots(const Matrix& m, int64_t row, int64_t start, int64_t columns, const float* g, double* out) {
  const char* at[N];
  Lanes sum[N] = {};
  for (int k = 0; k < N; ++k) at[k] = m.codes + (row + k) * S::bytes(m.numel) + S::bytes(start);
  const int64_t whole = columns & ~int64_t(31);
  if (S::scaled) {
    for (int64_t block = 0; block < whole; block += BLOCK) {
      Lanes part[N] = {};
      const int64_t end = block + BLOCK < whole ? block + BLOCK : whole;
      for (int64_t i = block; i < end; i += 2 * LANES) {
        Lanes a = take<Lanes>(g + i), b = take<Lanes>(g + i + LANES);
        for (int k = 0; k < N; ++k) part[k] += S::lanes(at[k], i, 0) * a + S::lanes(at[k], i, 1) * b;
      }
      for (int k = 0; k < N; ++k) sum[k] += part[k] * scale_at<S>(m, row + k, start + block);
    }
  } else {
    for (int64_t i = 0; i < whole; i += 2 * LANES) {
      Lanes a = take<Lanes>(g + i), b = take<Lanes>(g + i + LANES);
      for (int k = 0; k < N; ++k) sum[k] += S::lanes(at[k], i, 0) * a + S::lanes(at[k], i, 1) * b;
    }
  }
  for (int k = 0; k < N; ++k) {
    double total = 0;
    for (int j = 0; j < LANES; ++j) total += sum[k][j];
    for (int64_t i = whole; i < columns; ++i)
      total += double(S::one(at[k], i)) * scale_at<S>(m, row + k, start + i) * g[i];
    out[k] = total;
  }
}

// sums[r] += sum over N rows of coefficients[r][row] * row, for R vectors of coefficients of `width` numbers each.
template <class S, int N, int R>
void add_rows(const Matrix& m, int64_t row, int64_t start, int64_t columns, const float* coefficients, int64_t width,
              float* sums) {
  const char* at[N];
  for (int k = 0; k < N; ++k) at[k] = m.codes + (row + k) * S::bytes(m.numel) + S::bytes(start);
  const int64_t whole = columns & ~int64_t(31);
  const int64_t step = S::scaled ? BLOCK : CHUNK;
  for (int64_t block = 0; block < whole; block += step) {
    float c[R][N];
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < N; ++k)
        c[r][k] = coefficients[r * width + row + k] * scale_at<S>(m, row + k, start + block);
    const int64_t end = block + step < whole ? block + step : whole;
    for (int64_t i = block; i < end; i += 2 * LANES)
      for (int half = 0; half < 2; ++half) {
        Lanes number[N];
        for (int k = 0; k < N; ++k) number[k] = S::lanes(at[k], i, half);
        for (int r = 0; r < R; ++r) {
          Lanes sum = take<Lanes>(sums + r * CHUNK + i + half * LANES);
          for (int k = 0; k < N; ++k) sum += number[k] * c[r][k];
          put(sums + r * CHUNK + i + half * LANES, sum);
        }
      }
  }
  for (int64_t i = whole; i < columns; ++i)
    for (int k = 0; k < N; ++k)
      for (int r = 0; r < R; ++r)
        sums[r * CHUNK + i] +=
            S::one(at[k], i) * scale_at<S>(m, row + k, start + i) * coefficients[r * width + row + k];
}

// out[i][k] = <row i of g, row k of wide>, of N rows of g and K of wide; rows of g are `columns` long.
template <int N, int K>
void thin_dots(const float* g, int64_t columns, const float* wide, int64_t q, float* out, int64_t r) {
  Lanes sum[N][K] = {};
  for (int64_t j = 0; j < columns; j += LANES) {
    Lanes of_g[N];
    for (int i = 0; i < N; ++i) of_g[i] = take<Lanes>(g + i * columns + j);
    for (int k = 0; k < K; ++k) {
      Lanes of_wide = take<Lanes>(wide + k * q + j);
      for (int i = 0; i < N; ++i) sum[i][k] += of_g[i] * of_wide;
    }
  }
  for (int i = 0; i < N; ++i)
    for (int k = 0; k < K; ++k) {
      float total = 0;
      for (int j = 0; j < LANES; ++j) total += sum[i][k][j];
      out[i * r + k] = total;
    }
}

// G WIDE^T of the whole rows, or the slice of one, that a chunk is.
void thin_project(const Matrix& m, int64_t chunk, const float* g, float* half) {
  const int64_t start = m.start(chunk), columns = m.columns(chunk);
  const int64_t width = m.sliced() ? columns : m.q, count = columns / width;
  const float* wide = m.wide + start % m.q;
  float* out = half + (m.sliced() ? chunk : start / m.q) * m.r;
  for (int64_t i = 0; i < count; i += 2) {
    const bool two = i + 2 <= count;
    for (int64_t k = 0, step; k < m.r; k += step) {
      step = k + 4 <= m.r ? 4 : 1;
      auto dots = step == 4 ? (two ? thin_dots<2, 4> : thin_dots<1, 4>) : (two ? thin_dots<2, 1> : thin_dots<1, 1>);
      dots(g + i * width, width, wide + k * m.q, m.q, out + i * m.r + k, m.r);
    }
  }
}

// sums[s] += row of TALL_s times WIDE, for N rows of each of R matrices TALL_s of (m, r).
template <int N, int R>
void thin_rows(const Matrix& m, int64_t row, const float* tall, const float* wide, int64_t width, float* sums) {
  const int64_t size = m.numel / m.q * m.r;
  for (int64_t j = 0; j < width; j += LANES) {
    Lanes sum[R][N];
    for (int s = 0; s < R; ++s)
      for (int i = 0; i < N; ++i) sum[s][i] = take<Lanes>(sums + s * CHUNK + i * width + j);
    for (int64_t k = 0; k < m.r; ++k) {
      Lanes of_wide = take<Lanes>(wide + k * m.q + j);
      for (int s = 0; s < R; ++s)
        for (int i = 0; i < N; ++i) sum[s][i] += of_wide * tall[s * size + (row + i) * m.r + k];
    }
    for (int s = 0; s < R; ++s)
      for (int i = 0; i < N; ++i) put(sums + s * CHUNK + i * width + j, sum[s][i]);
  }
}

template <int R>
void thin_lift(const Matrix& m, int64_t start, int64_t columns, const float* tall, float* sums) {
  const int64_t width = m.sliced() ? columns : m.q, count = columns / width, row = start / m.q;
  const float* wide = m.wide + start % m.q;
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) thin_rows<2, R>(m, row + i, tall, wide, width, sums + i * width);
  for (; i < count; ++i) thin_rows<1, R>(m, row + i, tall, wide, width, sums + i * width);
}

template <class S, int R>
void lifted(const Matrix& m, int64_t start, int64_t columns, const float* coefficients, int64_t width,
            const void* tall, float* sums) {
  std::memset(sums, 0, R * CHUNK * sizeof(float));
  int64_t row = 0;
  for (; row + 4 <= m.rows; row += 4) add_rows<S, 4, R>(m, row, start, columns, coefficients, width, sums);
  for (; row < m.rows; ++row) add_rows<S, 1, R>(m, row, start, columns, coefficients, width, sums);
  if (m.r) thin_lift<R>(m, start, columns, static_cast<const float*>(tall), sums);
  for (int r = 0; r < R; ++r) order<S>(sums + r * CHUNK, columns & ~int64_t(31));
}

template <class Work>
void in_threads(int64_t chunks, int threads, const Work& work) {
  std::atomic<int64_t> next(0);
  auto run = [&] {
    for (int64_t chunk; (chunk = next.fetch_add(1)) < chunks;) work(chunk);
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(run);
  run();
  for (auto& thread : others) thread.join();
}

struct Table {
  std::vector<Matrix> matrices;
  std::vector<int64_t> begins;  // the first chunk of each parameter, and their number
  std::vector<int32_t> owner;   // of each chunk

  Table(int64_t count, const int64_t* numel, const int64_t* rows, const int64_t* first, void* const* codes,
        void* const* scales, void* const* wides, const int64_t* r, const int64_t* q) {
    begins.push_back(0);
    for (int64_t p = 0; p < count; ++p) {
      matrices.push_back({static_cast<const char*>(codes[p]), static_cast<const float*>(scales[p]), rows[p], numel[p],
                          first[p], static_cast<const float*>(wides[p]), r[p], q[p]});
      begins.push_back(begins.back() + matrices.back().chunks());
      owner.insert(owner.end(), matrices.back().chunks(), int32_t(p));
    }
  }
  int64_t within(int64_t chunk) const { return chunk - begins[owner[chunk]]; }
  int64_t start(int64_t chunk) const { return matrices[owner[chunk]].start(within(chunk)); }
  int64_t columns(int64_t chunk) const { return matrices[owner[chunk]].columns(within(chunk)); }
};

// Of the parameters `begin` to `end`, whose gradients are given: bf16 if `halves`, else fp32. Of a factored one
// `thin` gets G WIDE^T, (m, slices, r).
template <class S>
void project(const Table& table, int64_t begin, int64_t end, void* const* gradients, int halves, int threads,
             double* out, void* const* thin) {
  int64_t most = 1;
  for (int64_t p = begin; p < end; ++p) most = table.matrices[p].rows > most ? table.matrices[p].rows : most;
  const int64_t before = table.begins[begin], count = table.begins[end] - before;
  std::vector<double> parts(count * most);
  in_threads(count, threads, [&](int64_t number) {
    const int64_t chunk = before + number, p = table.owner[chunk];
    if (gradients[p - begin] == nullptr) return;
    const Matrix& m = table.matrices[p];
    const int64_t start = table.start(chunk), columns = table.columns(chunk);
    alignas(64) float g[CHUNK];
    if (halves) {
      const char* from = static_cast<const char*>(gradients[p - begin]) + 2 * start;
      for (int64_t i = 0; i < columns; ++i) g[i] = BF16::one(from, i);
    } else {
      std::memcpy(g, static_cast<const float*>(gradients[p - begin]) + start, columns * sizeof(float));
    }
    reorder<S>(g, columns & ~int64_t(31));
    double* part = parts.data() + number * most;
    int64_t row = 0;
    for (; row + 4 <= m.rows; row += 4) dots<S, 4>(m, row, start, columns, g, part + row);
    for (; row < m.rows; ++row) dots<S, 1>(m, row, start, columns, g, part + row);
    if (m.r) thin_project(m, table.within(chunk), g, static_cast<float*>(thin[p - begin]));
  });
  for (int64_t number = 0; number < count; ++number) {
    const Matrix& m = table.matrices[table.owner[before + number]];
    for (int64_t row = 0; row < m.rows; ++row) out[m.first + row] += parts[number * most + row];
  }
}

template <class S>
void add(const Table& table, void* const* weights, const float* coefficients, void* const* tall, int threads) {
  in_threads(table.owner.size(), threads, [&](int64_t chunk) {
    if (weights[table.owner[chunk]] == nullptr) return;
    const Matrix& m = table.matrices[table.owner[chunk]];
    const int64_t start = table.start(chunk), columns = table.columns(chunk);
    alignas(64) float sums[CHUNK];
    lifted<S, 1>(m, start, columns, coefficients + m.first, 0, tall[table.owner[chunk]], sums);
    float* to = static_cast<float*>(weights[table.owner[chunk]]) + start;
    for (int64_t i = 0; i < columns; ++i) to[i] += sums[i];
  });
}

// weights += lift(first row) - lift(second row), and way = lift(second row); where not `moved`: weights = before.
template <class S>
void publish(const Table& table, void* const* weights, void* const* before, void* const* way,
             const float* coefficients, int64_t dim, void* const* tall, int moved, int threads) {
  in_threads(table.owner.size(), threads, [&](int64_t chunk) {
    const int32_t p = table.owner[chunk];
    if (weights[p] == nullptr) return;
    const Matrix& m = table.matrices[p];
    const int64_t start = table.start(chunk), columns = table.columns(chunk);
    alignas(64) float sums[2 * CHUNK];
    lifted<S, 2>(m, start, columns, coefficients + m.first, dim, tall[p], sums);
    float *to = static_cast<float*>(weights[p]) + start, *ahead = static_cast<float*>(way[p]) + start;
    const float* old = before[p] == nullptr ? nullptr : static_cast<const float*>(before[p]) + start;
    const float *delta = sums, *back = sums + CHUNK;
    if (old != nullptr && !moved) {
      for (int64_t i = 0; i < columns; ++i) to[i] = old[i], ahead[i] = back[i];
    } else {
      for (int64_t i = 0; i < columns; ++i) to[i] = (delta[i] + to[i]) - back[i], ahead[i] = back[i];
    }
  });
}

// The sums of the columns of a flat tensor in rows of SUMS numbers, in parts of whole rows and whole lanes: sixteen
// numbers of SUMS lanes are SUMS numbers of sixteen.
constexpr int64_t SUMS = 61;
constexpr int64_t PART = 16 * SUMS * LANES;

void column_sums(const float* x, int64_t n, double* out) {
  Lanes sums[SUMS];
  for (Lanes& sum : sums) sum = Lanes{};
  int64_t i = 0;
  for (; i + SUMS * LANES <= n; i += SUMS * LANES)
    for (int64_t k = 0; k < SUMS; ++k) sums[k] += take<Lanes>(x + i + k * LANES);
  for (int64_t k = 0; k < SUMS; ++k)
    for (int64_t l = 0; l < LANES; ++l) out[(k * LANES + l) % SUMS] += sums[k][l];
  for (; i < n; ++i) out[i % SUMS] += x[i];
}

}  // namespace

// `storage`: 0 fp32, 1 bf16, 2 int8, 3 int4. Tables are made once a basis.
extern "C" {

void* sl2o_table(int64_t count, const int64_t* numel, const int64_t* rows, const int64_t* first, void* const* codes,
                 void* const* scales, void* const* wides, const int64_t* r, const int64_t* q) {
  return new Table(count, numel, rows, first, codes, scales, wides, r, q);
}

void sl2o_forget(void* table) { delete static_cast<Table*>(table); }

#define FOR_STORAGE(call)          \
  switch (storage) {               \
    case 0: call(F32); break;      \
    case 1: call(BF16); break;     \
    case 2: call(Int8); break;     \
    default: call(Int4); break;    \
  }

void sl2o_project(const void* table, int storage, int64_t begin, int64_t end, void* const* gradients,
                  int halves, int threads, double* out, void* const* thin) {
  const Table& t = *static_cast<const Table*>(table);
#define CALL(S) project<S>(t, begin, end, gradients, halves, threads, out, thin)
  FOR_STORAGE(CALL)
#undef CALL
}

void sl2o_add(const void* table, int storage, void* const* weights, const float* coefficients, void* const* tall,
              int threads) {
  const Table& t = *static_cast<const Table*>(table);
#define CALL(S) add<S>(t, weights, coefficients, tall, threads)
  FOR_STORAGE(CALL)
#undef CALL
}

void sl2o_publish(const void* table, int storage, void* const* weights, void* const* before, void* const* way,
                  const float* coefficients, int64_t dim, void* const* tall, int moved, int threads) {
  const Table& t = *static_cast<const Table*>(table);
#define CALL(S) publish<S>(t, weights, before, way, coefficients, dim, tall, moved, threads)
  FOR_STORAGE(CALL)
#undef CALL
}

// Of each of `count` tensors SUMS numbers, in `out`, which holds zeros.
void sl2o_sums(int64_t count, const int64_t* numel, void* const* tensors, int threads, double* out) {
  std::vector<int64_t> begins(1, 0);
  for (int64_t t = 0; t < count; ++t) begins.push_back(begins.back() + (numel[t] + PART - 1) / PART);
  std::vector<double> parts(begins.back() * SUMS);
  in_threads(begins.back(), threads, [&](int64_t number) {
    const int64_t t = std::upper_bound(begins.begin(), begins.end(), number) - begins.begin() - 1;
    const int64_t start = (number - begins[t]) * PART, rest = numel[t] - start;
    column_sums(static_cast<const float*>(tensors[t]) + start, rest < PART ? rest : PART, parts.data() + number * SUMS);
  });
  for (int64_t t = 0; t < count; ++t)
    for (int64_t number = begins[t]; number < begins[t + 1]; ++number)
      for (int64_t k = 0; k < SUMS; ++k) out[t * SUMS + k] += parts[number * SUMS + k];
}
}
