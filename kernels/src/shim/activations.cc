// Rotary embedding and SwiGLU on the CPU, in fp32 and bf16. Rust sends nothing else here.
#include "weights.h"

namespace tangelo {
namespace {

struct Heads {
  int64_t query, key, dim;
  int64_t all() const { return query + 2 * key; }
};

// Turns the heads of `from`, tokens `from_stride` elements apart, into `to`.
void turn(const Tensor& like, const void* from, int64_t from_stride, void* to, int64_t to_stride, const Tensor& cos,
          const Tensor& sin, int64_t heads, int64_t dim, bool back) {
  const auto& kernels = kernels_for(like);
  at::parallel_for(0, cos.size(0), grain_rows(heads * dim), [&](int64_t begin, int64_t end) {
    kernels.rope(from, from_stride, to, to_stride, cos.const_data_ptr<float>(), sin.const_data_ptr<float>(), begin, end,
                 heads, dim, back);
  });
}

Tensor turned(const Tensor& x, const Tensor& cos, const Tensor& sin, bool back) {
  auto in = x.contiguous();
  auto out = at::empty_like(in);
  const int64_t heads = x.size(1), dim = x.size(2);
  turn(in, in.const_data_ptr(), heads * dim, out.data_ptr(), heads * dim, cos, sin, heads, dim, back);
  return out;
}

struct Rope : Function<Rope> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& cos, const Tensor& sin) {
    ctx->save_for_backward({cos, sin});
    return turned(x, cos, sin, false);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::NoGradGuard no_grad;
    auto tables = ctx->get_saved_variables();
    return {turned(grads[0], tables[0], tables[1], true), Tensor(), Tensor()};
  }
};

char* offset(void* data, int64_t elements, const Tensor& like) {
  return static_cast<char*>(data) + elements * like.element_size();
}

variable_list split_and_turn(const Tensor& qkv_any, const Tensor& cos, const Tensor& sin, const Heads& heads) {
  auto qkv = qkv_any.contiguous();
  const int64_t tokens = qkv.size(0), stride = heads.all() * heads.dim;
  auto q = at::empty({tokens, heads.query, heads.dim}, qkv.options());
  auto k = at::empty({tokens, heads.key, heads.dim}, qkv.options());
  void* data = qkv.data_ptr();
  turn(qkv, data, stride, q.data_ptr(), heads.query * heads.dim, cos, sin, heads.query, heads.dim, false);
  turn(qkv, offset(data, heads.query * heads.dim, qkv), stride, k.data_ptr(), heads.key * heads.dim, cos, sin,
       heads.key, heads.dim, false);
  auto v = qkv.view({tokens, heads.all(), heads.dim}).narrow(1, heads.query + heads.key, heads.key).clone(
      at::MemoryFormat::Contiguous);
  return {q, k, v};
}

struct QkvRope : Function<QkvRope> {
  static variable_list forward(AutogradContext* ctx, const Tensor& qkv, const Tensor& cos, const Tensor& sin,
                               int64_t query_heads, int64_t key_heads, int64_t dim) {
    ctx->save_for_backward({cos, sin});
    ctx->saved_data["query_heads"] = query_heads;
    ctx->saved_data["key_heads"] = key_heads;
    return split_and_turn(qkv, cos, sin, {query_heads, key_heads, dim});
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::NoGradGuard no_grad;
    auto tables = ctx->get_saved_variables();
    auto dq = grads[0].contiguous(), dk = grads[1].contiguous();
    const Heads heads = {ctx->saved_data["query_heads"].toInt(), ctx->saved_data["key_heads"].toInt(), dq.size(2)};
    const int64_t tokens = dq.size(0), stride = heads.all() * heads.dim;
    auto dqkv = at::empty({tokens, stride}, dq.options());
    void* data = dqkv.data_ptr();
    turn(dq, dq.const_data_ptr(), heads.query * heads.dim, data, stride, tables[0], tables[1], heads.query, heads.dim,
         true);
    turn(dk, dk.const_data_ptr(), heads.key * heads.dim, offset(data, heads.query * heads.dim, dqkv), stride, tables[0],
         tables[1], heads.key, heads.dim, true);
    dqkv.view({tokens, heads.all(), heads.dim}).narrow(1, heads.query + heads.key, heads.key).copy_(grads[2]);
    return {dqkv, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

void check_tables(int64_t tokens, int64_t dim, const Tensor& cos, const Tensor& sin) {
  TORCH_CHECK(dim % 2 == 0, "rope: head size ", dim, " is odd");
  for (const auto* table : {&cos, &sin}) {
    TORCH_CHECK(table->dim() == 2 && table->size(0) == tokens && table->size(1) == dim / 2,
                "rope: cosines or sines of shape ", table->sizes(), ", expected [", tokens, ", ", dim / 2, "]");
    TORCH_CHECK(table->scalar_type() == at::kFloat, "rope: cosines and sines must be fp32, found ",
                table->scalar_type());
  }
}

Tensor swiglu_forward(const Tensor& gate_up) {
  const int64_t width = gate_up.size(-1) / 2;
  auto shape = gate_up.sizes().vec();
  shape.back() = width;
  auto out = at::empty(shape, gate_up.options());
  const auto& kernels = kernels_for(gate_up);
  const int64_t rows = width == 0 ? 0 : out.numel() / width;
  at::parallel_for(0, rows, grain_rows(4 * width), [&](int64_t begin, int64_t end) {
    kernels.swiglu(gate_up.const_data_ptr(), out.data_ptr(), begin, end, width);
  });
  return out;
}

struct Swiglu : Function<Swiglu> {
  static Tensor forward(AutogradContext* ctx, const Tensor& gate_up) {
    ctx->save_for_backward({gate_up});
    return swiglu_forward(gate_up);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::NoGradGuard no_grad;
    auto gate_up = ctx->get_saved_variables()[0];
    auto dy = grads[0].contiguous();
    auto dgate_up = at::empty_like(gate_up);
    const int64_t width = dy.size(-1), rows = width == 0 ? 0 : dy.numel() / width;
    const auto& kernels = kernels_for(gate_up);
    at::parallel_for(0, rows, grain_rows(4 * width), [&](int64_t begin, int64_t end) {
      kernels.swiglu_backward(gate_up.const_data_ptr(), dy.const_data_ptr(), dgate_up.data_ptr(), begin, end, width);
    });
    return {dgate_up};
  }
};

}  // namespace
}  // namespace tangelo

extern "C" {

// x [T, heads, hd], cos and sin [T, hd/2].
char* tangelo_rope(const at::Tensor* x, const at::Tensor* cos, const at::Tensor* sin, at::Tensor** out) {
  return tangelo::guarded([&] {
    TORCH_CHECK(x->dim() == 3, "rope: input of shape ", x->sizes(), ", expected [T, heads, head size]");
    tangelo::check_tables(x->size(0), x->size(2), *cos, *sin);
    *out = tangelo::give(tangelo::Rope::apply(*x, cos->contiguous(), sin->contiguous()));
  });
}

char* tangelo_qkv_rope(const at::Tensor* qkv, const at::Tensor* cos, const at::Tensor* sin, int64_t query_heads,
                       int64_t key_heads, int64_t head_dim, at::Tensor** out) {
  return tangelo::guarded([&] {
    TORCH_CHECK(qkv->dim() == 2 && qkv->size(1) == (query_heads + 2 * key_heads) * head_dim,
                "qkv_rope: input of shape ", qkv->sizes(), ", expected [T, (", query_heads, " + 2 * ", key_heads,
                ") * ", head_dim, "]");
    tangelo::check_tables(qkv->size(0), head_dim, *cos, *sin);
    auto parts = tangelo::QkvRope::apply(*qkv, cos->contiguous(), sin->contiguous(), query_heads, key_heads, head_dim);
    for (int i = 0; i < 3; i++) out[i] = tangelo::give(parts[i]);
  });
}

char* tangelo_swiglu(const at::Tensor* gate_up, at::Tensor** out) {
  return tangelo::guarded([&] {
    TORCH_CHECK(gate_up->dim() >= 1 && gate_up->size(-1) % 2 == 0, "swiglu: input of shape ", gate_up->sizes(),
                ", expected an even last dim");
    *out = tangelo::give(tangelo::Swiglu::apply(gate_up->contiguous()));
  });
}

}  // extern "C"
