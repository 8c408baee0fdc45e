// Softmax attention over the tiles that a schedule names.
//   s[b,h,i,j] = scale * <q[b,h,i,:], k[b,g,j,:]>,  g = h / (H / Hkv);  with a softcap s = softcap * tanh(s / softcap)
//   p[b,h,i,:] = softmax over the seen keys j, and the sink, of (s + bias)[b,h,i,j] + relative[b,h,j-i+Tq-1], and sinks[h]
//   o[b,h,i,:] = sum_j keep[b,h,i,j] / (1 - dropout_p) * p[b,h,i,j] * v[b,g,j,:]
//   lse[0,b,h,i] = log sum_j exp(s + bias)[b,h,i,j], relative and sinks included    (natural logarithm)
// A query that sees no key has o = 0, lse[0] = -inf and no gradient. What keys hold that a query doesn't see never reaches it.
//   q, o : (B, H, Tq, D), (B, H, Tq, Dv)     k, v : (B, Hkv, Tk, D), (B, Hkv, Tk, Dv), Hkv divides H; float32, bfloat16,
//   float16 bias : (B|1, H|1, Tq|1, Tk|1), any of the three dtypes, NULL is none lse : (2, B, H, Tq) fp32: lse[0] as above,
//   lse[1] what its rounding lost: p = exp(s + bias - lse[0]) * lse[1]
//   relative : (B|1, H|1, Tq + Tk - 1) float32, finite: what depends on the distance alone, without a T x T matrix. NULL: none
//   sinks : (H) float32: a score without key and value, that a query may spend its attention on. NULL: none
// The last dimension of q, k, v, o is contiguous; other strides are free. Sums are fp32.
//
// Who sees whom: query i sees key j where i + offset - left <= j <= i + offset + right (negative left or right: no limit),
// and, with a tile list, only in the tiles it names. Tiles are 64 queries x 64 keys, cut from position 0. The list is CSR
// over the query tiles of (set_b * set_h) sets, set_b being B or 1 and set_h H or 1:
//   row_ptr (set_b * set_h * q_tiles + 1) int64, cols int32 rising in a row, ids int32: -1 a full tile, else the row of
//   bits (n, 64) int64 whose word j has bit i set where query i of the tile sees key j.
//   q_tiles is ceil(Tq / 64), or 1: the same for all query tiles.
// On GPUs the list comes twice in the same arrays, by query tiles and then by key tiles: row_ptr (sets * (q_tiles + k_tiles) +
// 1), a key tile's cols being query tiles. Tiles that the band hides must not be in it, and its numbers are not checked there.
#ifndef MLCORE_ATTENTION_H_
#define MLCORE_ATTENTION_H_

#include "mlcore/api.h"

// lse may be NULL. softcap 0 is none. dropout_p in [0, 1]; keep is a function of seed, b, h, i and j alone
// (attention_dropout.h).
MLC_API int mlc_attention_fwd(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* bias,
                              const DLTensor* relative, const DLTensor* sinks, int64_t left, int64_t right, int64_t offset,
                              const DLTensor* row_ptr, const DLTensor* cols, const DLTensor* ids, const DLTensor* bits,
                              int64_t set_b, int64_t set_h, double scale, double softcap, double dropout_p, int64_t seed,
                              DLTensor* o, DLTensor* lse);

// Gradients of sum(o * d_o) + sum(lse[0] * d_lse). d_lse (B, H, Tq) may be NULL; dbias (fp32, bias's shape, contiguous, zeroed)
// may be NULL. dbias's last dimension must be Tk: of a bias that is the same for all keys the gradient is the sum of d_lse.
// drelative (B, H, Tq + Tk - 1) fp32, contiguous, zeroed, may be NULL; it makes each (b, key head) the work of one thread.
// sinks' gradient follows from o, lse and their gradients. dq, dk, dv: dtypes and shapes of q, k, v, contiguous in the last
// dimension. delta (B, H, Tq) fp32, contiguous: scratch; NULL on the CPU, which then takes its own.
MLC_API int mlc_attention_bwd(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* bias,
                              const DLTensor* relative, const DLTensor* sinks, int64_t left, int64_t right, int64_t offset,
                              const DLTensor* row_ptr, const DLTensor* cols, const DLTensor* ids, const DLTensor* bits,
                              int64_t set_b, int64_t set_h, double scale, double softcap, double dropout_p, int64_t seed,
                              const DLTensor* o, const DLTensor* lse, const DLTensor* d_o, const DLTensor* d_lse, DLTensor* dq,
                              DLTensor* dk, DLTensor* dv, DLTensor* dbias, DLTensor* drelative, DLTensor* delta);

// A dense boolean mask (set_b, set_h, Tq|1, Tk), any strides, as a tile list, in two calls: the first fills codes
// (sets, q_tiles, k_tiles) int32 with -2 (skip), -1 (full) or the row of bits, and counts (2) int64 with the number of listed
// tiles and of rows of bits; the second fills the lists, allocated by those counts.
MLC_API int mlc_attention_mask_codes(const DLTensor* mask, DLTensor* codes, DLTensor* counts);
MLC_API int mlc_attention_mask_tiles(const DLTensor* mask, const DLTensor* codes, DLTensor* row_ptr, DLTensor* cols,
                                     DLTensor* ids, DLTensor* bits);

// A pattern (set_b, set_h) as a tile list. program (int64) is the number of sets, where each set's tree starts, and the trees,
// each node before its parts:
//   0 left right br          a band as above; a negative limit is none; br: offset is Tk - Tq, else 0
//   1 stride br              keys j with (i + offset - j) % stride == 0
//   2 stride phase           keys j with j % stride == phase
//   3 br n (begin end)*      i + offset or j is a position in one of the n stretches, which rise
//   4 n q[n+1] k[n+1] x ...  queries q[d] .. q[d+1]-1 see keys k[d] .. k[d+1]-1; with x = 1 as the tree that follows says,
//                            where positions and lengths are the document's own (nodes 6 and 7 can't stand there)
//   5 bq bk n m mask[n*m]    mask[i / bq, j / bk] is not 0
//   6 q[Tq] k[Tk]            q[i] == k[j] >= 0
//   7 n row_ptr[q_tiles+1] cols[listed] ids[listed] bits[n*64]
//   8 n ..., 9 n ..., 10 .   all of n trees, any of n trees, not the tree that follows
// counts (2) int64 gets the number of listed tiles and of rows of bits, each row of bits being there once. Where cols, ids
// (room) and bits (room, 64) have room for them they are filled, and row_ptr (sets * q_tiles + 1); else nothing is: call again.
MLC_API int mlc_attention_lower(const DLTensor* program, int64_t Tq, int64_t Tk, DLTensor* row_ptr, DLTensor* cols,
                                DLTensor* ids, DLTensor* bits, DLTensor* counts);

// The forward for a few queries over a key-value cache, which is read where it lies. Query t of sequence b stands at position
// lengths[b] - Tq + t and sees keys max(starts[b], position - left) .. min(lengths[b] - 1, position + right). On the CPU its
// bits are those of mlc_attention_fwd over the same keys.
//   k_cache, v_cache : (pages, Hkv, P, D), (pages, Hkv, P, Dv), q's dtype or int8: position t of sequence b is row t % P of
//   page page_table[b, t / P]; without a page_table (B, n) int64 of page b. What no query sees is not read.
//   k_scale, v_scale : (pages, Hkv, P) float32: what the rows of int8 caches are multiplied with. NULL: the caches are not int8
//   lengths, starts : (B) int64; starts NULL: 0     slopes : (B|1, H) float32: ALiBi, -slope * distance. NULL: none
//   lse : (B, H, Tq) float32, may be NULL
//   scratch : (B, H, Tq, n, Dv + 2) float32, contiguous, for GPUs: keys are cut at positions 256, 512, ..., and of the parts
//   that the queries of a sequence see, the first n are attended to. NULL: one. The CPU's function takes its own.
// On GPUs the values of lengths, starts and page_table aren't checked: lengths beyond the cache end there, keys of pages that
// don't exist are seen by nobody, and new keys for them aren't written.
MLC_API int mlc_attention_decode(const DLTensor* q, const DLTensor* k_cache, const DLTensor* v_cache, const DLTensor* k_scale,
                                 const DLTensor* v_scale, const DLTensor* page_table, const DLTensor* lengths,
                                 const DLTensor* starts, const DLTensor* slopes, const DLTensor* sinks, int64_t left,
                                 int64_t right, double scale, double softcap, DLTensor* o, DLTensor* lse, DLTensor* scratch);

// Writes k, v (B, Hkv, Tnew, D or Dv) at positions lengths[b] - Tnew .. lengths[b] - 1 of such caches. An int8 row is
// round(x / scale) with scale = max |x| / 127.
MLC_API int mlc_attention_append(const DLTensor* k, const DLTensor* v, const DLTensor* page_table, const DLTensor* lengths,
                                 DLTensor* k_cache, DLTensor* v_cache, DLTensor* k_scale, DLTensor* v_scale);

#endif  // MLCORE_ATTENTION_H_
