// The CPU kernels of one instruction set, as a table. Pointers to elements are untyped; `Typed` holds the variants
// for fp32 and bf16. Kernels work on ranges of rows or elements and know nothing of threads.
#pragma once
#include <cstdint>

namespace tangelo::cpu {

// Query, key and value heads are strided rows in token-major tensors. Positions count from the first key. Every query
// sees a key, and every key has a query at its position or behind: num_keys <= offset + num_queries.
struct AttentionShape {
  int64_t num_queries;
  int64_t num_keys;
  int64_t offset;        // the first query's position
  int64_t head_dim;
  int64_t q_stride;      // elements between tokens of q, and of the output
  int64_t kv_stride;     // elements between tokens of k and v
  float scale;
  int64_t window;        // keys a query sees, itself included; at least offset + num_queries for all
};

// New tokens of one sequence and one key head, behind `offset` tokens that lie in pages. `table` names the page of each
// BLOCK tokens of the sequence; page p of the key head begins at `pages` + p * page_stride.
struct PagedShape {
  int64_t num_queries;   // new tokens
  int64_t offset;        // tokens before them
  int64_t head_dim;
  int64_t group;         // query heads that read the key head
  int64_t q_stride;      // elements between tokens of q, and of the output
  int64_t kv_stride;     // elements between new tokens of k and v
  int64_t page_stride;   // floats
  float scale;
  int64_t window;        // keys a query sees, itself included; at least offset + num_queries for all
};

// An exponential race among a row's tokens: who wins, how fast beside a token of the largest logit, that logit, and the sum
// of exp(logit - largest).
struct Race {
  int64_t token;
  float speed, largest, sum;
};

struct Typed {
  // y = x / rms(x) * weight for rows [begin, end) of width D; stores 1 / rms in `inverse`. With a residual,
  // `sum` receives x + residual, rounded, and is what is normalised.
  void (*rms_norm)(const void* x, const void* residual, const void* weight, void* sum, void* y, float* inverse,
                   int64_t begin, int64_t end, int64_t width, float eps);
  // dx for rows [begin, end), plus `dsum` if given; adds dy * normed over the rows to `dweight` (fp32) if given.
  void (*rms_norm_backward)(const void* dy, const void* dsum, const void* x, const void* weight, const float* inverse,
                            void* dx, float* dweight, int64_t begin, int64_t end, int64_t width);
  // Turns `heads` heads of tokens [begin, end) by cos, sin [T, hd/2]; the sine is negated when `back`.
  void (*rope)(const void* from, int64_t from_stride, void* to, int64_t to_stride, const float* cos, const float* sin,
               int64_t begin, int64_t end, int64_t heads, int64_t head_dim, bool back);
  void (*swiglu)(const void* gate_up, void* out, int64_t begin, int64_t end, int64_t width);
  void (*swiglu_backward)(const void* gate_up, const void* dy, void* dgate_up, int64_t begin, int64_t end,
                          int64_t width);
  // Negative log-likelihood of `target` under one row of logits; with a `scratch` (room for the row in fp32) the row
  // becomes (softmax - one hot) * scale.
  double (*cross_entropy_row)(void* logits, int64_t width, int64_t target, float scale, float* scratch);
  // Rows `ids` of `grad` added to fp32 rows.
  void (*add_rows)(const void* grad, const int64_t* ids, int64_t count, int64_t width, float* table);
  void (*add_to)(const void* from, float* to, int64_t begin, int64_t end);
  // Sums of `grad` over rows, added to fp32 columns [begin, end).
  void (*add_column_sums)(const void* grad, int64_t rows, int64_t width, float* to, int64_t begin, int64_t end);
  // One head. `lse` has one float per query, or is null. `scratch` as attention_scratch says.
  void (*attention)(const AttentionShape& shape, const void* q, const void* k, const void* v, void* out, float* lse,
                    float* scratch);
  // The same from where an earlier call left its softmax: `out` is fp32 and goes on from what it and `lse` hold.
  void (*attention_running)(const AttentionShape& shape, const void* q, const void* k, const void* v, void* out,
                            float* lse, float* scratch);
  // dq, dk, dv of one head; dk and dv are fp32, [num_keys, head_dim] with stride `dkv_stride`.
  void (*attention_backward)(const AttentionShape& shape, const void* q, const void* k, const void* v, const void* out,
                             const void* dout, const float* lse, void* dq, float* dk, float* dv, int64_t dkv_stride,
                             float* scratch);
  // The same, added to what dq, dk and dv hold; `out` and dq are fp32.
  void (*attention_backward_running)(const AttentionShape& shape, const void* q, const void* k, const void* v,
                                     const void* out, const void* dout, const float* lse, void* dq, float* dk,
                                     float* dv, int64_t dkv_stride, float* scratch);
  // Of a row of some of the logits: the largest (minus infinity where `width` is 0), the sum of exp(logit - largest),
  // and the one of `target`, minus infinity where that is -1.
  void (*softmax_stats_row)(const void* logits, int64_t width, int64_t target, float* stats);
  // Such a row becomes (exp(logit - lse) - one hot) * scale; exactly 0 where the scale is.
  void (*softmax_gradient_row)(void* logits, int64_t width, int64_t target, float lse, float scale);
  // Of a row of some of the logits, divided by a temperature: the largest (minus infinity where `width` is 0), the sum of
  // exp(logit - largest), that of exp(logit - largest)(logit - largest), and the one of `target`, minus infinity where
  // that is -1.
  void (*distribution_row)(const void* logits, int64_t width, int64_t target, float inverse_temperature, float* stats);
  // Such a row becomes the gradient of a loss whose slopes by the target's log-probability and by the entropy are a and b:
  // a (one hot - p) - b p (ln p + entropy), over the temperature. `row` holds the largest logit of the whole vocabulary,
  // ln of the sum of exp(logit - largest), the entropy, a and b; where both slopes are 0 the gradient is exactly 0.
  void (*distribution_gradient_row)(void* logits, int64_t width, int64_t target, float inverse_temperature,
                                    const float* row);
  // Outputs [begin, end) of x [rows, inputs] times w [outputs, inputs] transposed, plus `bias` if given; the bits of an
  // output depend on its row of x and its row of w alone. `scratch` as linear_scratch says.
  void (*linear)(const void* x, const void* w, const void* bias, void* out, int64_t rows, int64_t inputs,
                 int64_t outputs, int64_t begin, int64_t end, float* scratch);
  int64_t (*page_floats)(int64_t head_dim);
  // Puts the new keys and values of one key head into their pages.
  void (*append_to_pages)(const PagedShape& shape, const void* k, const void* v, float* pages, const int32_t* table);
  // Outputs of new tokens [first, first + rows), which lie in one tile of positions, for the query heads of one key head;
  // `q` and `out` point at the group's first head. `scratch` as paged_attention_scratch says.
  void (*paged_attention)(const PagedShape& shape, const void* q, float* pages, const int32_t* table, void* out,
                          int64_t first, int64_t rows, float* scratch);
  // Of a row of logits divided by a temperature: ln of the sum of exponentials; the log-probability of `target`; what an
  // exponential race draws from the tokens from `first` on; the first of the largest; those that reach `threshold`
  // (undivided).
  double (*log_normaliser)(const void* logits, int64_t width, float inverse_temperature);
  double (*logprob_row)(const void* logits, int64_t width, int64_t target, float inverse_temperature);
  Race (*race_row)(const void* logits, int64_t width, int64_t first, float inverse_temperature, const uint32_t* key);
  int64_t (*argmax_row)(const void* logits, int64_t width);
  int64_t (*above_row)(const void* logits, int64_t width, float threshold, float* values, int32_t* tokens);
};

struct AdamWScalars {
  float decay;         // 1 - lr * weight_decay
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float step_size;     // lr / (1 - beta1^t)
  float inverse_root;  // 1 / sqrt(1 - beta2^t)
  float eps;
  float grad_scale;
};

struct Kernels {
  const char* name;
  Typed f32;
  Typed b16;
  int64_t (*attention_scratch)(const AttentionShape& shape);           // floats
  int64_t (*attention_backward_scratch)(const AttentionShape& shape);  // floats
  // `copy` may be null; `copy_is_bf16` says what it holds.
  void (*adamw)(float* master, float* exp_avg, float* exp_avg_sq, const float* grad, void* copy, bool copy_is_bf16,
                const AdamWScalars& scalars, int64_t begin, int64_t end);
  int64_t (*linear_scratch)(int64_t rows, int64_t inputs);  // floats
  int64_t (*paged_attention_scratch)(int64_t head_dim);     // floats
  // Of `count` tokens with weights, the index of the one an exponential race draws.
  int64_t (*race_of)(const float* weights, const int32_t* tokens, int64_t count, const uint32_t* key);
  // to = exp(value * inverse_temperature - highest)
  void (*exponentials)(const float* values, int64_t count, float inverse_temperature, float highest, float* to);
  double (*square_sum)(const float* from, int64_t length);
};

// The table for the processor this runs on; chosen once. TANGELO_CPU_KERNELS=generic|avx2|avx512|avx512_bf16 asks for one.
const Kernels& kernels();

extern const Kernels generic_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;
#endif

}  // namespace tangelo::cpu
