// What linear_attention.cc hands to the per-ISA kernels: a checked problem, and the phases that it calls them in. README.md
// says why the work is cut so.
#pragma once
#include "core/cpu_features.h"
#include "core/tokens.h"

namespace mlcore {

constexpr int kChunk = 64;  // tokens that are computed at once; a constant of the results' last bits

enum class FeatureMap : int { none, elu, relu, softmax };
enum class Gate : int { none, scalar, vector };

struct LinearAttentionProblem {
  int64_t B, H, Tq, Tk, D, Dv, sequences, span;
  FeatureMap map;
  Gate gated;
  bool normalize, causal, delta_rule;
  Tokens q, k, v, gate, beta, o;
  const int64_t* cu_seqlens;  // null: one sequence a batch entry
  float* den;                 // (B, H, Tq)
  const float* initial_state;
  float *final_state, *states;
  int64_t slots;  // of states, a (b, h)
  // Backward only.
  Tokens d_o, dq, dk, dv;
  float *dgate, *dbeta;
  const float* d_final_state;
  float* d_initial_state;

  bool delta() const { return delta_rule; }
  int64_t state_cols() const { return Dv + (normalize ? 1 : 0); }
};

// One (sequence, head): the unit that has a state of its own.
struct Item {
  int64_t sequence, b, h, start, q_length, k_length;
  int64_t first_slot;  // of its states
};

struct LinearAttentionStep {
  int64_t rows, D, Dv;  // rows: B * H
  FeatureMap map;
  Gate gated;
  bool normalize;
  Tokens q, k, v, gate, beta, o;  // T is 1, st unused
  int64_t H;
  const float* state;
  float* new_state;
};

// Slots hold a chunk's operands between the phases, states hold S (D, Dv padded) and z (D padded); all sizes are in floats.
// Phases with columns [c0, c1) of the values, multiples of width, may run side by side for different columns, those of
// different chunks too where no state is given.
struct LinearAttentionKernels {
  int width;
  int64_t (*state_floats)(const LinearAttentionProblem&);
  int64_t (*slot_floats)(const LinearAttentionProblem&, bool backward);
  int64_t (*scratch_floats)(const LinearAttentionProblem&);                            // of a thread
  void (*load_state)(const LinearAttentionProblem&, const float* rows, float* state);  // rows null: zeros
  void (*store_state)(const LinearAttentionProblem&, const float* state, float* rows);

  // Causal, chunk of tokens [t, t + kChunk) of the item. Either advance() in the chunks' order, or local_states() in any order,
  // scan() of rows [d0, d1) of the states in the chunks' order, and outputs() in any order (kept: where
  // the state before the chunk is wanted, or null): the bits are the same.
  void (*prepare)(const LinearAttentionProblem&, const Item&, int64_t t, float* slot, float* scratch, bool backward);
  void (*advance)(const LinearAttentionProblem&, const Item&, int64_t t, float* slot, float* state, int64_t c0, int64_t c1,
                  float* scratch);
  void (*local_states)(const LinearAttentionProblem&, const Item&, int64_t t, float* slot, bool backward);
  void (*scan)(const LinearAttentionProblem&, float* slot, float* state, int64_t d0, int64_t d1, bool backward);
  void (*outputs)(const LinearAttentionProblem&, const Item&, int64_t t, float* slot, float* kept, float* scratch);
  // Backward: local_states(), scan() and its reverse, or with the delta rule restate() and reverse(); then gradients().
  void (*reverse_scan)(const LinearAttentionProblem&, float* slot, float* d_state, int64_t d0, int64_t d1);
  void (*restate)(const LinearAttentionProblem&, const Item&, int64_t t, float* slot, float* state, int64_t c0, int64_t c1,
                  float* scratch);
  void (*reverse)(const LinearAttentionProblem&, const Item&, int64_t t, float* slot, float* d_state, int64_t c0, int64_t c1,
                  float* scratch);
  // next_slot: of the next chunk, null for a group's last one, behind which state stands.
  void (*gradients)(const LinearAttentionProblem&, const Item&, int64_t t, float* slot, float* next_slot, const float* state,
                    float* scratch);

  // Not causal: the state over keys, then outputs; the state's gradient over queries, then the gradients.
  void (*gather_keys)(const LinearAttentionProblem&, const Item&, int64_t t, float* state, int64_t c0, int64_t c1,
                      float* scratch);
  void (*read_queries)(const LinearAttentionProblem&, const Item&, int64_t t, const float* state, float* scratch);
  void (*gather_queries)(const LinearAttentionProblem&, const Item&, int64_t t, float* d_state, int64_t c0, int64_t c1,
                         float* scratch);
  void (*query_gradients)(const LinearAttentionProblem&, const Item&, int64_t t, const float* state, float* scratch);
  void (*key_gradients)(const LinearAttentionProblem&, const Item&, int64_t t, const float* d_state, float* scratch);

  void (*step)(const LinearAttentionStep&, int64_t row_begin, int64_t row_end, float* scratch);
};
MLC_KERNEL_TABLE(LinearAttentionKernels, linear_attention_kernels)

}  // namespace mlcore
