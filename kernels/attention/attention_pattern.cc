// The kinds of pattern, and how a program is read as a tree of them. Nothing here depends on the instruction set.
#include "attention/attention_pattern.h"

#include "core/tensor.h"

namespace mlcore {
namespace {

constexpr const char* kOp = "attention";
constexpr uint64_t kAllBits = ~uint64_t{0};

int64_t floor_mod(int64_t a, int64_t m) { return (a % m + m) % m; }

// Bits i with i % stride == phase.
uint64_t comb(int64_t stride, int64_t phase) {
  uint64_t word = 0;
  for (int64_t i = phase; i < 64; i += stride) word |= uint64_t{1} << i;
  return word;
}

void add(Spans& s, int64_t a, int64_t b) {
  if (a >= b) return;
  if (!s.empty() && s.back().second >= a) {
    s.back().second = std::max(s.back().second, b);
  } else {
    s.emplace_back(a, b);
  }
}

Spans meet(const Spans& x, const Spans& y) {
  Spans out;
  for (size_t i = 0, j = 0; i < x.size() && j < y.size();) {
    add(out, std::max(x[i].first, y[j].first), std::min(x[i].second, y[j].second));
    x[i].second < y[j].second ? ++i : ++j;
  }
  return out;
}

Spans join(const Spans& x, const Spans& y) {
  Spans out;
  for (size_t i = 0, j = 0; i < x.size() || j < y.size();) {
    const bool take_x = j == y.size() || (i < x.size() && x[i].first < y[j].first);
    const auto& next = take_x ? x[i++] : y[j++];
    add(out, next.first, next.second);
  }
  return out;
}

Spans complement(const Spans& x, int64_t length) {
  Spans out;
  int64_t from = 0;
  for (const auto& [a, b] : x) {
    add(out, from, std::min(a, length));
    from = std::max(from, b);
  }
  add(out, from, length);
  return out;
}

int64_t offset_of(const Frame& f, bool bottom_right) { return bottom_right ? f.Tk - f.Tq : 0; }

struct Band final : Pattern {
  int64_t left, right;
  bool bottom_right;
  Band(int64_t l, int64_t r, bool br)
      : left(l < 0 ? Schedule::kUnlimited : l), right(r < 0 ? Schedule::kUnlimited : r), bottom_right(br) {}

  void spans(const Frame& f, int64_t i0, int64_t i1, Spans& some, Spans& all) const override {
    const int64_t off = offset_of(f, bottom_right);
    add(some, std::max<int64_t>(0, i0 + off - left), std::min(f.Tk, i1 + off + right));
    add(all, std::max<int64_t>(0, i1 - 1 + off - left), std::min(f.Tk, i0 + 1 + off + right));
  }
  void words(const Frame& f, int64_t i0, int, int64_t j0, int nk, uint64_t* out) const override {
    const int64_t off = offset_of(f, bottom_right);
    for (int j = 0; j < nk; ++j) out[j] = bit_range(j0 + j - off - right - i0, j0 + j - off + left - i0 + 1);
  }
};

// Keys a multiple of stride away from the query.
struct Stride final : Pattern {
  int64_t stride;
  bool bottom_right;
  uint64_t combs[64];
  Stride(int64_t s, bool br) : stride(s), bottom_right(br) {
    for (int64_t r = 0; r < std::min<int64_t>(stride, 64); ++r) combs[r] = comb(stride, r);
  }
  void spans(const Frame& f, int64_t, int64_t, Spans& some, Spans& all) const override {
    add(some, 0, f.Tk);
    if (stride == 1) add(all, 0, f.Tk);
  }
  void words(const Frame& f, int64_t i0, int, int64_t j0, int nk, uint64_t* out) const override {
    int64_t phase = floor_mod(j0 - offset_of(f, bottom_right) - i0, stride);
    for (int j = 0; j < nk; ++j) {
      out[j] = phase < 64 ? combs[phase] : 0;
      phase = phase + 1 == stride ? 0 : phase + 1;
    }
  }
};

// Keys j with j % stride == phase, for every query.
struct Columns final : Pattern {
  int64_t stride, phase;
  Columns(int64_t s, int64_t p) : stride(s), phase(p) {}
  void spans(const Frame& f, int64_t, int64_t, Spans& some, Spans& all) const override {
    if (stride < kTile) {
      add(some, 0, f.Tk);
      if (stride == 1) add(all, 0, f.Tk);
      return;
    }
    for (int64_t j = phase; j < f.Tk; j += stride) {
      add(some, j, j + 1);
      add(all, j, j + 1);
    }
  }
  void words(const Frame&, int64_t, int, int64_t j0, int nk, uint64_t* out) const override {
    for (int j = 0; j < nk; ++j) out[j] = floor_mod(j0 + j, stride) == phase ? kAllBits : 0;
  }
};

// Tokens that see all and are seen by all, as sorted stretches of positions.
struct Global final : Pattern {
  bool bottom_right;
  Spans tokens;
  Global(bool br, Spans t) : bottom_right(br), tokens(static_cast<Spans&&>(t)) {}

  uint64_t range_word(int64_t from) const {  // bit i: position from + i is a token
    uint64_t word = 0;
    auto it = std::upper_bound(tokens.begin(), tokens.end(), from, [](int64_t p, const auto& s) { return p < s.second; });
    for (; it != tokens.end() && it->first < from + 64; ++it) word |= bit_range(it->first - from, it->second - from);
    return word;
  }
  void spans(const Frame& f, int64_t i0, int64_t i1, Spans& some, Spans& all) const override {
    const int64_t off = offset_of(f, bottom_right);
    bool any = false, every = false;
    auto it = std::upper_bound(tokens.begin(), tokens.end(), i0 + off, [](int64_t p, const auto& s) { return p < s.second; });
    if (it != tokens.end()) any = it->first < i1 + off, every = it->first <= i0 + off && it->second >= i1 + off;
    const Spans keys = meet(tokens, {{0, f.Tk}}), whole = f.Tk > 0 ? Spans{{0, f.Tk}} : Spans{};
    some = any ? whole : keys;
    all = every ? whole : keys;
  }
  void words(const Frame& f, int64_t i0, int, int64_t j0, int nk, uint64_t* out) const override {
    const uint64_t queries = range_word(i0 + offset_of(f, bottom_right)), keys = range_word(j0);
    for (int j = 0; j < nk; ++j) out[j] = (keys >> j) & 1 ? kAllBits : queries;
  }
};

// Document d's queries [q[d], q[d + 1]) see its keys [k[d], k[d + 1]), all of them or as `inside` says in its own frame.
struct Documents final : Pattern {
  int64_t n;
  const int64_t *q, *k;
  std::unique_ptr<Pattern> inside;

  int64_t first_with(int64_t i) const { return std::upper_bound(q + 1, q + n + 1, i) - (q + 1); }

  template <class F>  // body(d, a, b) for the documents with queries in [i0, i1), a .. b of them
  void for_documents(int64_t i0, int64_t i1, F&& body) const {
    for (int64_t d = first_with(i0); d < n && q[d] < i1; ++d)
      if (q[d + 1] > q[d]) body(d, std::max(i0, q[d]), std::min(i1, q[d + 1]));
  }
  void spans(const Frame& f, int64_t i0, int64_t i1, Spans& some, Spans& all) const override {
    int64_t covered = 0;
    bool first = true;
    for_documents(i0, i1, [&](int64_t d, int64_t a, int64_t b) {
      covered += b - a;
      Spans s, e;
      const Frame own{q[d + 1] - q[d], k[d + 1] - k[d]};
      if (inside) {
        inside->spans(own, a - q[d], b - q[d], s, e);
      } else {
        add(s, 0, own.Tk);
        e = s;
      }
      for (Spans* x : {&s, &e}) {
        *x = meet(*x, {{0, own.Tk}});
        for (auto& [from, to] : *x) from += k[d], to += k[d];
      }
      some = join(some, s);
      all = first ? e : meet(all, e);
      first = false;
    });
    if (covered < std::min(i1, f.Tq) - i0) all.clear();
  }
  void words(const Frame&, int64_t i0, int nq, int64_t j0, int nk, uint64_t* out) const override {
    std::fill(out, out + nk, 0);
    for_documents(i0, i0 + nq, [&](int64_t d, int64_t a, int64_t b) {
      const int64_t from = std::max(j0, k[d]), to = std::min(j0 + nk, k[d + 1]);
      if (from >= to) return;
      const uint64_t rows = bit_range(a - i0, b - i0);
      uint64_t own[kTile];
      if (inside) inside->words({q[d + 1] - q[d], k[d + 1] - k[d]}, i0 - q[d], nq, j0 - k[d], nk, own);
      for (int64_t j = from; j < to; ++j) out[j - j0] |= inside ? own[j - j0] & rows : rows;
    });
  }
};

// Query block i / bq sees key block j / bk where the mask says so.
struct Blocks final : Pattern {
  int64_t bq, bk, nq_blocks, nk_blocks;
  const int64_t* mask;

  bool sees(int64_t r, int64_t c) const { return mask[r * nk_blocks + c] != 0; }
  void spans(const Frame& f, int64_t i0, int64_t i1, Spans& some, Spans& all) const override {
    const int64_t r0 = i0 / bq, r1 = std::min((i1 - 1) / bq, nq_blocks - 1);
    for (int64_t c = 0; c < nk_blocks; ++c) {
      bool any = false, every = true;
      for (int64_t r = r0; r <= r1; ++r) sees(r, c) ? any = true : every = false;
      if (any) add(some, c * bk, std::min((c + 1) * bk, f.Tk));
      if (any && every && (i1 - 1) / bq < nq_blocks) add(all, c * bk, std::min((c + 1) * bk, f.Tk));
    }
  }
  void words(const Frame&, int64_t i0, int nq, int64_t j0, int nk, uint64_t* out) const override {
    int64_t last = -1;
    uint64_t word = 0;
    for (int j = 0; j < nk; ++j) {
      const int64_t c = j0 + j < 0 ? -1 : (j0 + j) / bk;
      if (c < 0 || c >= nk_blocks) {
        out[j] = 0;
        continue;
      }
      if (c != last) {
        word = 0;
        for (int64_t r = std::max<int64_t>(i0, 0) / bq; r < nq_blocks && r * bq < i0 + nq; ++r)
          if (sees(r, c)) word |= bit_range(r * bq - i0, (r + 1) * bq - i0);
        last = c;
      }
      out[j] = word;
    }
  }
};

// Equal ids see each other; a negative id nobody.
struct Clusters final : Pattern {
  const int64_t *q, *k;
  int64_t Tk;
  // A sketch of each key tile's ids: one of 64 bits an id, and the id that all have, or -1.
  std::vector<uint64_t> sketch;
  std::vector<int64_t> only;

  static uint64_t bit_of(int64_t id) { return uint64_t{1} << ((static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u) >> 58); }
  static void summary(const int64_t* ids, int64_t n, uint64_t& bits, int64_t& single) {
    bits = 0, single = n > 0 ? ids[0] : -1;
    for (int64_t i = 0; i < n; ++i) {
      if (ids[i] >= 0) bits |= bit_of(ids[i]);
      if (ids[i] != single) single = -1;
    }
  }
  Clusters(const int64_t* q_ids, const int64_t* k_ids, int64_t length) : q(q_ids), k(k_ids), Tk(length) {
    for (int64_t j = 0; j < Tk; j += kTile) {
      sketch.push_back(0), only.push_back(-1);
      summary(k + j, std::min<int64_t>(kTile, Tk - j), sketch.back(), only.back());
    }
  }
  void spans(const Frame&, int64_t i0, int64_t i1, Spans& some, Spans& all) const override {
    uint64_t bits;
    int64_t single;
    summary(q + i0, i1 - i0, bits, single);
    for (size_t t = 0; t < sketch.size(); ++t) {
      const int64_t a = static_cast<int64_t>(t) * kTile, b = std::min(a + kTile, Tk);
      if (sketch[t] & bits) add(some, a, b);
      if (single >= 0 && only[t] == single) add(all, a, b);
    }
  }
  void words(const Frame&, int64_t i0, int nq, int64_t j0, int nk, uint64_t* out) const override {
    for (int j = 0; j < nk; ++j) {
      const int64_t id = k[j0 + j];
      uint64_t word = 0;
      if (id >= 0)
        for (int i = 0; i < nq; ++i) word |= static_cast<uint64_t>(q[i0 + i] == id) << i;
      out[j] = word;
    }
  }
};

// A tile list, as attention.h has it; only in the frame of the whole problem, where tiles are tiles.
struct Listed final : Pattern {
  const int64_t *row_ptr, *cols, *ids, *bits;

  void spans(const Frame& f, int64_t i0, int64_t, Spans& some, Spans& all) const override {
    for (int64_t e = row_ptr[i0 / kTile]; e < row_ptr[i0 / kTile + 1]; ++e) {
      const int64_t a = cols[e] * kTile, b = std::min(a + kTile, f.Tk);
      add(some, a, b);
      if (ids[e] < 0) add(all, a, b);
    }
  }
  void words(const Frame&, int64_t i0, int, int64_t j0, int nk, uint64_t* out) const override {
    const int64_t *begin = cols + row_ptr[i0 / kTile], *end = cols + row_ptr[i0 / kTile + 1];
    const int64_t* found = std::lower_bound(begin, end, j0 / kTile);
    const bool listed = found != end && *found == j0 / kTile;
    for (int j = 0; j < nk; ++j) {
      const int64_t id = listed ? ids[found - cols] : 0;
      out[j] = !listed ? 0 : id < 0 ? kAllBits : static_cast<uint64_t>(bits[id * kTile + j]);
    }
  }
};

struct Combined final : Pattern {
  bool every;  // and, else or
  std::vector<std::unique_ptr<Pattern>> parts;

  void spans(const Frame& f, int64_t i0, int64_t i1, Spans& some, Spans& all) const override {
    if (every) add(some, 0, f.Tk), all = some;
    for (const auto& part : parts) {
      Spans s, e;
      part->spans(f, i0, i1, s, e);
      some = every ? meet(some, s) : join(some, s);
      all = every ? meet(all, e) : join(all, e);
    }
  }
  void words(const Frame& f, int64_t i0, int nq, int64_t j0, int nk, uint64_t* out) const override {
    std::fill(out, out + nk, every ? kAllBits : 0);
    uint64_t own[kTile];
    for (const auto& part : parts) {
      part->words(f, i0, nq, j0, nk, own);
      for (int j = 0; j < nk; ++j) out[j] = every ? out[j] & own[j] : out[j] | own[j];
    }
  }
};

struct Not final : Pattern {
  std::unique_ptr<Pattern> part;

  void spans(const Frame& f, int64_t i0, int64_t i1, Spans& some, Spans& all) const override {
    Spans s, e;
    part->spans(f, i0, i1, s, e);
    some = complement(e, f.Tk), all = complement(s, f.Tk);
  }
  void words(const Frame& f, int64_t i0, int nq, int64_t j0, int nk, uint64_t* out) const override {
    part->words(f, i0, nq, j0, nk, out);
    for (int j = 0; j < nk; ++j) out[j] = ~out[j];
  }
};

// Reads a program word by word and never beyond its end.
class Reader {
 public:
  Reader(const int64_t* program, int64_t size, int64_t at, const Frame& whole)
      : program_(program), size_(size), at_(at), whole_(whole) {}

  std::unique_ptr<Pattern> node(int depth = 0, bool whole_frame = true) {
    require(depth < 64, kOp, ": program must nest less than 64 deep");
    enum Kind { kBand, kStride, kColumns, kGlobal, kDocuments, kBlocks, kClusters, kListed, kAnd, kOr, kNot };
    const int64_t kind = next();
    switch (kind) {
      case kBand: {
        const int64_t left = next(), right = next();
        return std::make_unique<Band>(left, right, next() != 0);
      }
      case kStride: {
        const int64_t stride = positive();
        return std::make_unique<Stride>(stride, next() != 0);
      }
      case kColumns: {
        const int64_t stride = positive();
        return std::make_unique<Columns>(stride, next());
      }
      case kGlobal: {
        const bool bottom_right = next() != 0;
        const int64_t n = length();
        Spans tokens;
        for (int64_t i = 0; i < n; ++i) {
          const int64_t a = next(), b = next();
          require(a < b && (tokens.empty() || tokens.back().second <= a), kOp, ": global tokens must rise");
          add(tokens, a, b);
        }
        return std::make_unique<Global>(bottom_right, static_cast<Spans&&>(tokens));
      }
      case kDocuments: {
        auto p = std::make_unique<Documents>();
        p->n = length();
        p->q = bounds(p->n + 1, whole_.Tq, "cu_seqlens");
        p->k = bounds(p->n + 1, whole_.Tk, "cu_seqlens_k");
        if (next() != 0) p->inside = node(depth + 1, false);
        return p;
      }
      case kBlocks: {
        auto p = std::make_unique<Blocks>();
        p->bq = positive(), p->bk = positive(), p->nq_blocks = length(), p->nk_blocks = length();
        p->mask = take(p->nq_blocks * p->nk_blocks);
        return p;
      }
      case kClusters: {
        require(whole_frame, kOp, ": clusters can't stand inside of documents");
        const int64_t *q = take(whole_.Tq), *k = take(whole_.Tk);
        return std::make_unique<Clusters>(q, k, whole_.Tk);
      }
      case kListed: {
        require(whole_frame, kOp, ": a dense pattern can't stand inside of documents");
        auto p = std::make_unique<Listed>();
        const int64_t q_tiles = (whole_.Tq + kTile - 1) / kTile, k_tiles = (whole_.Tk + kTile - 1) / kTile, rows = length();
        p->row_ptr = bounds(q_tiles + 1, int64_t{1} << 40, "row_ptr");
        const int64_t listed = p->row_ptr[q_tiles];
        p->cols = take(listed), p->ids = take(listed), p->bits = take(rows * kTile);
        for (int64_t e = 0; e < listed; ++e)
          require(p->cols[e] >= 0 && p->cols[e] < k_tiles && p->ids[e] < rows, kOp, ": program lists a tile that is none");
        return p;
      }
      case kAnd:
      case kOr: {
        auto p = std::make_unique<Combined>();
        p->every = kind == kAnd;
        for (int64_t n = length(); n > 0; --n) p->parts.push_back(node(depth + 1, whole_frame));
        return p;
      }
      case kNot: {
        auto p = std::make_unique<Not>();
        p->part = node(depth + 1, whole_frame);
        return p;
      }
    }
    fail(MLC_INVALID_ARGUMENT, kOp, ": program has no pattern of kind ", kind);
  }

 private:
  const int64_t* take(int64_t n) {
    require(n >= 0 && n <= size_ - at_, kOp, ": program is cut short at ", at_);
    at_ += n;
    return program_ + at_ - n;
  }
  int64_t next() { return *take(1); }
  int64_t positive() {
    const int64_t n = next();
    require(n > 0, kOp, ": program must have a positive size at ", at_ - 1, "; got ", n);
    return n;
  }
  int64_t length() {
    const int64_t n = next();
    require(n >= 0 && n <= size_, kOp, ": program must have a length at ", at_ - 1, "; got ", n);
    return n;
  }
  const int64_t* bounds(int64_t n, int64_t most, const char* name) {
    const int64_t* at = take(n);
    require(at[0] == 0, kOp, ": ", name, " must begin with 0; got ", at[0]);
    for (int64_t i = 1; i < n; ++i) require(at[i] >= at[i - 1], kOp, ": ", name, " must not fall; it does at ", i);
    require(at[n - 1] <= most, kOp, ": ", name, " must end at ", most, " at most; got ", at[n - 1]);
    return at;
  }

  const int64_t* program_;
  int64_t size_, at_;
  Frame whole_;
};

}  // namespace

std::unique_ptr<Pattern> read_pattern(const int64_t* program, int64_t size, int64_t at, const Frame& whole) {
  return Reader(program, size, at, whole).node();
}

}  // namespace mlcore
