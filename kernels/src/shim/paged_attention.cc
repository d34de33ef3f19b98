// Attention of new tokens of many sequences over keys and values in pages, on the CPU; see cpu/paged_attention.inc.
//
// The unit of work is one tile of one sequence's new tokens and one key head. A sequence whose new tokens are one tile
// (every one that is decoding) has its keys and values put into their pages by that unit; longer ones beforehand.
#include <sys/mman.h>

#include "attention.h"

extern "C" {

// New tokens of a sequence: rows of q, k and v, behind `offset` earlier tokens; its pages are those from `first_page` on
// in the list of all sequences' pages.
struct PagedSequence {
  int64_t first_row, num_rows, offset, first_page;
};

}  // extern "C"

namespace tangelo {
namespace {

constexpr int64_t PAGE_TOKENS = 64;

struct Tile {
  size_t sequence;
  int64_t key_head, first, rows, work;
  bool whole;
};

struct Paged {
  const Tensor &q, &k, &v;
  Tensor& out;
  float* pages;
  const int32_t* tables;
  Geometry geometry;
  int64_t head_floats;
  double scale;
  int64_t window;

  cpu::PagedShape shape_of(const PagedSequence& s) const {
    return {s.num_rows,
            s.offset,
            geometry.dim,
            geometry.group(),
            geometry.heads * geometry.dim,
            geometry.key_heads * geometry.dim,
            geometry.key_heads * head_floats,
            static_cast<float>(scale),
            std::min(window, s.offset + s.num_rows)};
  }

  void append(const PagedSequence& s, int64_t head) const {
    const int64_t at = (s.first_row * geometry.key_heads + head) * geometry.dim;
    kernels_for(q).append_to_pages(shape_of(s), at_element(k, at), at_element(v, at), pages + head * head_floats,
                                   tables + s.first_page);
  }

  void attend(const PagedSequence& s, const Tile& tile, float* scratch) const {
    const int64_t at = (s.first_row * geometry.heads + tile.key_head * geometry.group()) * geometry.dim;
    kernels_for(q).paged_attention(shape_of(s), at_element(q, at), pages + tile.key_head * head_floats,
                                   tables + s.first_page, at_element(out, at), tile.first, tile.rows, scratch);
  }
};

std::vector<Tile> tiles_of(const PagedSequence* sequences, size_t count, int64_t key_heads) {
  std::vector<Tile> tiles;
  for (size_t i = 0; i < count; i++) {
    const PagedSequence& s = sequences[i];
    for (int64_t first = 0; first < s.num_rows;) {
      const int64_t rows = std::min(PAGE_TOKENS - (s.offset + first) % PAGE_TOKENS, s.num_rows - first);
      const int64_t work = rows * (s.offset + first + rows);
      for (int64_t head = 0; head < key_heads; head++) {
        tiles.push_back({i, head, first, rows, work, rows == s.num_rows});
      }
      first += rows;
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) { return a.work > b.work; });
  return tiles;
}

void attend(const Paged& paged, const PagedSequence* sequences, size_t count) {
  const int64_t key_heads = paged.geometry.key_heads;
  const auto tiles = tiles_of(sequences, count, key_heads);
  std::vector<std::pair<size_t, int64_t>> long_ones;
  for (const Tile& tile : tiles) {
    if (tile.first == 0 && !tile.whole) long_ones.push_back({tile.sequence, tile.key_head});
  }
  if (!long_ones.empty()) {
    for_units(long_ones, 1, [&](const auto& unit, float*) { paged.append(sequences[unit.first], unit.second); });
  }
  for_units(tiles, cpu::kernels().paged_attention_scratch(paged.geometry.dim), [&](const Tile& tile, float* scratch) {
    if (tile.whole) paged.append(sequences[tile.sequence], tile.key_head);
    paged.attend(sequences[tile.sequence], tile, scratch);
  });
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pages, int64_t num_pages,
           const PagedSequence* sequences, size_t count, const int32_t* tables, size_t num_entries) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && k.sizes() == v.sizes() && k.size(2) == q.size(2) && k.size(1) > 0 &&
                  q.size(1) % k.size(1) == 0 && q.size(0) == k.size(0),
              "paged attention: queries of shape ", q.sizes(), ", keys ", k.sizes(), " and values ", v.sizes(),
              " do not fit; expected [T, H, hd], [T, K, hd] twice, H a multiple of K");
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
              "paged attention: queries, keys and values of types ", q.scalar_type(), ", ", k.scalar_type(), ", ",
              v.scalar_type());
  TORCH_CHECK(pages.is_contiguous() && pages.scalar_type() == at::kFloat, "paged attention: pages must be packed floats");
  for (size_t i = 0; i < num_entries; i++) {
    TORCH_CHECK(tables[i] >= 0 && tables[i] < num_pages, "paged attention: page ", tables[i], " of ", num_pages);
  }
  for (size_t i = 0; i < count; i++) {
    const auto& s = sequences[i];
    const int64_t pages_needed = (s.offset + s.num_rows + PAGE_TOKENS - 1) / PAGE_TOKENS;
    TORCH_CHECK(s.first_row >= 0 && s.num_rows > 0 && s.first_row + s.num_rows <= q.size(0) && s.offset >= 0 &&
                    s.first_page >= 0 && s.first_page + pages_needed <= static_cast<int64_t>(num_entries),
                "paged attention: sequence ", i, " of rows ", s.first_row, " + ", s.num_rows, " behind ", s.offset,
                " tokens, with pages from ", s.first_page, " of ", num_entries, ", does not fit ", q.size(0), " rows");
  }
}

}  // namespace
}  // namespace tangelo

extern "C" {

// Floats of one page of one key head of `type_of`'s element type.
char* tangelo_page_floats(const at::Tensor* type_of, int64_t head_dim, int64_t* out) {
  return tangelo::guarded([&] { *out = tangelo::kernels_for(*type_of).page_floats(head_dim); });
}

// `floats` of zeros straight from the system, which has them back as soon as the tensor is gone, whatever the allocator
// keeps.
char* tangelo_mapped_floats(int64_t floats, at::Tensor** out) {
  return tangelo::guarded([&] {
    const size_t bytes = floats * sizeof(float);
    void* memory = mmap(nullptr, std::max<size_t>(bytes, 1), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(memory != MAP_FAILED, "no memory for ", bytes, " bytes of keys and values");
#ifdef MADV_HUGEPAGE
    madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    auto unmap = [bytes](void* address) { munmap(address, std::max<size_t>(bytes, 1)); };
    *out = tangelo::give(at::from_blob(memory, {floats}, unmap, at::kFloat));
  });
}

// `pages` [P, K, floats of a page]: those of one layer.
char* tangelo_paged_attention(const at::Tensor* q_, const at::Tensor* k_, const at::Tensor* v_, const at::Tensor* pages,
                              const PagedSequence* sequences, size_t count, const int32_t* tables, size_t num_entries,
                              double scale, int64_t window, at::Tensor** out) {
  return tangelo::guarded([&] {
    at::NoGradGuard no_grad;
    auto q = q_->contiguous(), k = k_->contiguous(), v = v_->contiguous();
    tangelo::check(q, k, v, *pages, pages->size(0), sequences, count, tables, num_entries);
    auto result = at::empty_like(q);
    const tangelo::Paged paged = {q,      k,      v,
                                  result, pages->data_ptr<float>(), tables, tangelo::geometry_of(q, k),
                                  tangelo::kernels_for(q).page_floats(q.size(2)), scale, window};
    TORCH_CHECK(pages->size(1) == k.size(1) && pages->size(2) == paged.head_floats, "paged attention: pages of shape ",
                pages->sizes(), " for ", k.size(1), " key heads of ", paged.head_floats, " floats");
    tangelo::attend(paged, sequences, count);
    *out = tangelo::give(result);
  });
}

}  // extern "C"
