// NF4 products for compute capability 9.0. `nf4_sm90.py` compiles this file with
//   BM  rows of x a tile (8, 16, 32, 48 or 64): the n of wgmma, whose m is 64 rows of W: the product is computed transposed
//   WN  blocks of 64 rows of W a tile (1, 2 or 4); the other of the four multiplying warpgroups split K
//   ST  stages of the pipeline, KS blocks of 64 along K a warpgroup each
// and puts `multiply16` before it: one wgmma m64nBMk16 with its A operand in registers.
//
// A block of threads is persistent: it takes an equal share of all (tile, K) units, in order. One thread copies packed W
// (bulk) and x (tensor map, 128-byte swizzle) into the stages. A warpgroup looks up the bf16 values of two codes at once
// in a table of 256 pairs that holds one copy a lane, so that no two lanes meet in a bank; while one product of 64 along
// K runs, the next one's values are looked up. A product's sums are scaled in float32 by the block's maximum.
//
// A tile shared by several blocks: each writes its sums, the last to arrive adds them in the order of the blocks. So the
// result depends on neither timing nor the other rows of x.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int WK = 4 / WN;
constexpr int KS = 2;
constexpr int X_BYTES = BM * 128;            // x of one block along K
constexpr int W_BYTES = 2304;                // W of one 64 x 64 block: 2048 bytes of codes, 64 float32 maxima
constexpr int STAGE_X = KS * WK * X_BYTES;
constexpr int STAGE_W = 4 * KS * W_BYTES;
constexpr int SUMS = BM / 2;                 // float32 sums a thread
constexpr int AT_X = 65536;                  // offsets in shared memory; the pair table comes first
constexpr int AT_W = AT_X + ST * STAGE_X;
constexpr int AT_FULL = AT_W + ST * STAGE_W;
constexpr int AT_EMPTY = AT_FULL + 8 * ST;
constexpr int AT_LAST = AT_EMPTY + 8 * ST;
constexpr int MULTIPLIERS = 512;             // threads of four warpgroups; the fifth copies

struct __align__(64) TensorMap { u8 bytes[128]; };

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra READY;\nbra AGAIN;\nREADY:\n}" ::"r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void copy_w(u32 to, const void* from, u32 bytes, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}
// Coordinates: element in a block of 64 along K, row of x, block along K. What lies outside x arrives as zero.
__device__ __forceinline__ void copy_x(u32 to, const TensorMap* x, int row, int block, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
      "l"(x), "r"(0), "r"(row), "r"(block), "r"(barrier) : "memory");
}
__device__ __forceinline__ void sync_threads(int barrier, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ float from_bf16(u16 value) { return __uint_as_float((u32)value << 16); }
__device__ __forceinline__ u32 to_bf16_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// out[M, N] = x[M, K] @ W[N, K]^T + bias, all bf16.
//   packed    W as `nf4.pack` gives it: [N / 64, K / 64] blocks of W_BYTES
//   pairs     [256] bf16 values of a byte's codes, low half of the byte in the low half of the word
//   sums      [gridDim.x, 2, WN, 128 * SUMS] float32 scratch
//   arrivals  [tiles * WN] int32, all zero before and after
//   share     units of (tile, WK * KS blocks along K) a block of threads takes
extern "C" __global__ __launch_bounds__(MULTIPLIERS + 128, 1) void nf4_linear(
    const __grid_constant__ TensorMap x, const u8* __restrict__ packed, const u16* __restrict__ bias, u16* __restrict__ out,
    float* __restrict__ sums, int* __restrict__ arrivals, const u32* __restrict__ pairs, int M, int N, int K, int share) {
  extern __shared__ __align__(1024) u8 memory[];
  const u32 base = (u32)__cvta_generic_to_shared(memory);
  const u32 full = base + AT_FULL, empty = base + AT_EMPTY;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int blocks_k = K / 64, blocks_n = (N + 63) / 64;
  const int units_k = (blocks_k + WK * KS - 1) / (WK * KS);
  const int tiles_m = (M + BM - 1) / BM, tiles = (blocks_n + WN - 1) / WN * tiles_m;
  const int begin = blockIdx.x * share, end = min(begin + share, tiles * units_k);

  if (thread == 0) {
    for (int i = 0; i < ST; i++) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, MULTIPLIERS / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  // A row of 256 bytes a pair: its lower half holds the 32 copies, its upper half is lent to `add_warpgroups`.
  for (int i = thread; i < 256 * 8; i += MULTIPLIERS + 128) {
    const u32 pair = pairs[i >> 3];
    *(uint4*)(memory + (i >> 3) * 256 + (i & 7) * 16) = make_uint4(pair, pair, pair, pair);
  }
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;");
  if (begin >= end) return;
  int tile = begin / units_k, unit = begin - tile * units_k, stage = 0;

  if (warp >= MULTIPLIERS / 32) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (thread != MULTIPLIERS) return;
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    // W does not change: the first stages of it are on their way before the kernel in front, which gives x, is over.
    auto fetch_w = [&]() {
      const u32 barrier = full + 8 * stage;
      const int tile_n = tile / tiles_m;
      u32 bytes = STAGE_X;
#pragma unroll
      for (int group = 0; group < 4; group++) {
        const int blocks = tile_n * WN + group / WK < blocks_n ? min(KS, blocks_k - (unit * WK + group % WK) * KS) : 0;
        bytes += max(blocks, 0) * W_BYTES;
      }
      barrier_expect(barrier, bytes);
#pragma unroll
      for (int group = 0; group < 4; group++) {
        const int n = tile_n * WN + group / WK, k = (unit * WK + group % WK) * KS;
        const int blocks = n < blocks_n ? min(KS, blocks_k - k) : 0;
        if (blocks > 0) {
          copy_w(base + AT_W + stage * STAGE_W + group * KS * W_BYTES, packed + ((size_t)n * blocks_k + k) * W_BYTES,
                 blocks * W_BYTES, barrier, policy);
        }
      }
    };
    auto fetch_x = [&]() {
      copy_x(base + AT_X + stage * STAGE_X, &x, tile % tiles_m * BM, unit * WK * KS, full + 8 * stage);
    };
    auto advance = [&]() {
      if (++stage == ST) stage = 0;
      if (++unit == units_k) { unit = 0; tile++; }
    };
    const int ahead = min(ST, end - begin);
    for (int i = 0; i < ahead; i++, advance()) fetch_w();
    asm volatile("griddepcontrol.wait;" ::: "memory");
    tile = begin / units_k; unit = begin - tile * units_k; stage = 0;
    for (int i = 0; i < ahead; i++, advance()) fetch_x();
    u32 parity = 0;
    for (int left = end - begin - ahead; left > 0; left--) {
      barrier_wait(empty + 8 * stage, parity);
      fetch_w();
      fetch_x();
      if (stage == ST - 1) parity ^= 1;
      advance();
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");
  // The shuffle tells the compiler that a warp agrees on it.
  const int group = __shfl_sync(0xffffffff, warp >> 2, 0), group_n = group / WK, group_k = group % WK;
  const int in_group = thread & 127, in_warps = warp & 3;
  const u32 column = lane * 4;
  const u32 to_maxima = 2048 + (in_warps * 16 + (lane >> 2) * 2) * 4 - (in_warps * 32 + lane) * 16;
  float total[SUMS], sum[SUMS];
#pragma unroll
  for (int i = 0; i < SUMS; i++) total[i] = 0.f;
  u32 even[16], odd[16];
  float2 even_scale, odd_scale;

  auto look_up = [&](u32 at, u32* values, float2& scale) {
    u32 word[4];
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3]) : "r"(at));
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(scale.x), "=f"(scale.y) : "r"(at + to_maxima));
#pragma unroll
    for (int i = 0; i < 16; i++) {
      // One byte permutation gives byte * 256 + lane * 4.
      values[i] = *(const u32*)(memory + __byte_perm(word[i >> 2], column, 0x6504 | (i & 3) << 4));
    }
  };
  auto multiply = [&](u32 at, const u32* values) {
    const u64 descriptor = (u64)1 << 62 | (u64)64 << 32 | (u64)1 << 16 | (u64)((at & 0x3ffff) >> 4);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int i = 0; i < 4; i++) multiply16(sum, values + 4 * i, descriptor + 2 * i, i > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  };
  auto add_scaled = [&](float2 scale) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    // The wait names no register: this keeps the compiler from reading the sums before it.
#pragma unroll
    for (int i = 0; i < SUMS; i++) asm volatile("" : "+f"(sum[i])::"memory");
#pragma unroll
    for (int i = 0; i < SUMS; i += 4) {
      total[i] += scale.x * sum[i];
      total[i + 1] += scale.x * sum[i + 1];
      total[i + 2] += scale.y * sum[i + 2];
      total[i + 3] += scale.y * sum[i + 3];
    }
  };
  // Adds what the warpgroups of one block of rows have of different K; the first of them has the result.
  auto add_warpgroups = [&]() {
    if (WK == 1) return;
    auto place = [&](int other, int i) {
      const u32 at = ((group_n * (WK - 1) + other) * (SUMS / 4) + i) * 2048 + in_group * 16;
      return (float4*)(memory + (at >> 7 << 8) + 128 + (at & 127));
    };
    if (group_k > 0) {
#pragma unroll
      for (int i = 0; i < SUMS / 4; i++)
        *place(group_k - 1, i) = make_float4(total[4 * i], total[4 * i + 1], total[4 * i + 2], total[4 * i + 3]);
    }
    sync_threads(1 + group_n, WK * 128);
    if (group_k == 0) {
#pragma unroll
      for (int other = 0; other < WK - 1; other++) {
#pragma unroll
        for (int i = 0; i < SUMS / 4; i++) {
          const float4 more = *place(other, i);
          total[4 * i] += more.x; total[4 * i + 1] += more.y; total[4 * i + 2] += more.z; total[4 * i + 3] += more.w;
        }
      }
    }
    sync_threads(1 + group_n, WK * 128);
  };
  // Adds what the blocks of threads that share a tile have; false for all of them but the last to arrive.
  auto add_blocks = [&]() {
    const int first = tile * units_k / share, last = ((tile + 1) * units_k - 1) / share;
    if (first == last) return true;
    // Of a block's tiles at most two are shared: the one it begins in and the one it ends in.
    auto place = [&](int block) {
      const int second = block * share / units_k != tile;
      return sums + ((size_t)(block * 2 + second) * WN + group_n) * (128 * SUMS) + in_group * 4;
    };
    float* const mine = place(blockIdx.x);
#pragma unroll
    for (int i = 0; i < SUMS / 4; i++)
      __stcg((float4*)(mine + i * 512), make_float4(total[4 * i], total[4 * i + 1], total[4 * i + 2], total[4 * i + 3]));
    sync_threads(5 + group_n, 128);
    int* const is_last = (int*)(memory + AT_LAST) + group_n;
    if (in_group == 0) {
      int* const arrived = arrivals + tile * WN + group_n;
      // Between the two barriers one thread's fences hold for the whole warpgroup.
      __threadfence();
      const bool all = atomicAdd(arrived, 1) == last - first;
      if (all) {
        __threadfence();
        *arrived = 0;
      }
      *is_last = all;
    }
    sync_threads(5 + group_n, 128);
    if (!*is_last) return false;
#pragma unroll
    for (int i = 0; i < SUMS; i++) total[i] = 0.f;
    for (int block = first; block <= last; block++) {
      const float* const more = place(block);
#pragma unroll
      for (int i = 0; i < SUMS / 4; i++) {
        const float4 part = __ldcg((const float4*)(more + i * 512));
        total[4 * i] += part.x; total[4 * i + 1] += part.y; total[4 * i + 2] += part.z; total[4 * i + 3] += part.w;
      }
    }
    return true;
  };
  auto finish = [&]() {
    const int tile_n = tile / tiles_m, block_n = tile_n * WN + group_n;
    add_warpgroups();
    if (group_k == 0 && block_n < blocks_n && add_blocks()) {
      // `pack` gives a thread neighbouring rows of W, so that it writes two bf16 at once.
      const int n = block_n * 64 + in_warps * 16 + (lane >> 2) * 2, m = (tile - tile_n * tiles_m) * BM + (lane & 3) * 2;
      if (n < N) {
        const float first = bias == nullptr ? 0.f : from_bf16(bias[n]), second = bias == nullptr ? 0.f : from_bf16(bias[n + 1]);
#pragma unroll
        for (int i = 0; i < BM / 8; i++) {
          u16* const to = out + (size_t)(m + 8 * i) * N + n;
          if (m + 8 * i < M) *(u32*)to = to_bf16_pair(total[4 * i] + first, total[4 * i + 2] + second);
          if (m + 8 * i + 1 < M) *(u32*)(to + N) = to_bf16_pair(total[4 * i + 1] + first, total[4 * i + 3] + second);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < SUMS; i++) total[i] = 0.f;
  };

  const u32 first_w = base + AT_W + group * KS * W_BYTES + (in_warps * 32 + lane) * 16;
  const u32 first_x = base + AT_X + group_k * KS * X_BYTES;
  u32 at_w = first_w, at_x = first_x, barrier = full, parity = 0;
  barrier_wait(barrier, parity);
  look_up(at_w, even, even_scale);
  for (int left = end - begin; left > 0; left--) {
    const int k = (unit * WK + group_k) * KS;
    multiply(at_x, even);
    look_up(at_w + W_BYTES, odd, odd_scale);
    // Past the end of K, x is zero and W is whatever the stage held before.
    if (k >= blocks_k) even_scale = make_float2(0.f, 0.f);
    if (k + 1 >= blocks_k) odd_scale = make_float2(0.f, 0.f);
    add_scaled(even_scale);
    multiply(at_x + X_BYTES, odd);
    const u32 done = barrier + 8 * ST;
    if (++stage == ST) {
      stage = 0; parity ^= 1; at_w = first_w; at_x = first_x; barrier = full;
    } else {
      at_w += STAGE_W; at_x += STAGE_X; barrier += 8;
    }
    if (left > 1) {
      barrier_wait(barrier, parity);
      look_up(at_w, even, even_scale);
    }
    add_scaled(odd_scale);
    __syncwarp();
    if (lane == 0) barrier_arrive(done);
    if (++unit == units_k || left == 1) { finish(); unit = 0; tile++; }
  }
}

// dense[N, K] bf16 = level * maximum, rounded once, of packed W. grid: (K / 64, N / 64); 128 threads.
extern "C" __global__ __launch_bounds__(128) void nf4_dequantize(
    const u8* __restrict__ packed, const float* __restrict__ levels, u16* __restrict__ dense, int N, int K) {
  __shared__ float level[16];
  __shared__ __align__(16) u8 tile[64 * 144];  // rows of 128 bytes and 16 to spread the banks
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  if (thread < 16) level[thread] = levels[thread];
  const u8* const block = packed + ((size_t)blockIdx.y * (K / 64) + blockIdx.x) * W_BYTES;
  const uint4 words = *(const uint4*)(block + thread * 16);
  const int row = warp * 16 + (lane >> 2) * 2, column = (lane & 3) * 2;
  const float2 scale = *(const float2*)(block + 2048 + row * 4);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 word = i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float by = j & 1 ? scale.y : scale.x;
      const u32 pair = to_bf16_pair(level[word >> 8 * j & 15] * by, level[word >> (8 * j + 4) & 15] * by);
      *(u32*)(tile + (row + (j & 1)) * 144 + (i * 16 + (j >> 1) * 8 + column) * 2) = pair;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int at = i * 128 + thread, n = blockIdx.y * 64 + (at >> 3);
    if (n < N) *(uint4*)(dense + (size_t)n * K + blockIdx.x * 64 + (at & 7) * 8) = *(const uint4*)(tile + (at >> 3) * 144 + (at & 7) * 16);
  }
}
