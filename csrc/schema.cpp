// Every operator's schema and tags.
#include <ATen/core/enum_tag.h>
#include <torch/library.h>

#include <string>

namespace wmha {
namespace {

// The options, in the order that ops.h repeats. Keyword-only, so that new ones don't break a saved model.
std::string options(const std::string& temperature) {
  return "*, SymInt window_left=-1, SymInt window_right=-1, float? scale=None, " + temperature +
         ", float softcap=0.0, float dropout_p=0.0, SymInt? query_offset=None, Generator? generator=None)";
}

std::string weights_options(const std::string& temperature) {
  return "*, SymInt window_left=-1, SymInt window_right=-1, float? scale=None, " + temperature +
         ", float softcap=0.0, SymInt? query_offset=None)";
}

std::string multi_head_options(const std::string& temperature) {
  return "*, int num_heads, int? num_kv_heads=None, " + options(temperature).substr(std::string("*, ").size());
}

const std::string attention = "(Tensor query, Tensor key, Tensor value, ";
const std::string weights = "(Tensor query, Tensor key, ";
const std::string multi_head_attention =
    "(Tensor query, Tensor key, Tensor value, Tensor q_weight, Tensor k_weight, Tensor v_weight, "
    "Tensor? q_bias, Tensor? k_bias, Tensor? v_bias, Tensor out_weight, Tensor? out_bias, ";
const std::string backward =
    "(Tensor grad_output, Tensor? grad_logsumexp, Tensor query, Tensor key, Tensor value, Tensor output, "
    "Tensor logsumexp, Tensor rng_state, ";

} // namespace

TORCH_LIBRARY(wmha, library) {
  const std::vector<at::Tag> deterministic{at::Tag::pt2_compliant_tag};
  const std::vector<at::Tag> random{at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded};

  // PyTorch tries overloads in the order of registration and turns a 0-dim tensor into a float without a word, which
  // would lose its gradient: the overload with a tensor comes first.
  const auto define = [&](const std::string& name, const std::string& leading, auto options, const std::string& result,
                          const std::vector<at::Tag>& tags) {
    library.def(
        (name + ".temperature_tensor" + leading + options("Tensor temperature") + " -> " + result).c_str(), tags);
    library.def((name + leading + options("float temperature=1.0") + " -> " + result).c_str(), tags);
  };

  define("attention", attention, options, "Tensor", random);
  define("attention_with_lse", attention, options, "(Tensor output, Tensor logsumexp)", random);
  define("attention_weights", weights, weights_options, "Tensor", deterministic);
  define("multi_head_attention", multi_head_attention, multi_head_options, "Tensor", random);

  define("_attention_forward", attention, options, "(Tensor output, Tensor logsumexp, Tensor rng_state)", random);
  define(
      "_attention_backward", backward, options,
      "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_temperature)", deterministic);
  // True where dropout keeps the weight of query first_query + i and key first_key + j: (batch, heads, queries, keys).
  library.def(
      "_dropout_mask(Tensor rng_state, *, SymInt batch, SymInt heads, SymInt queries, SymInt keys, float dropout_p, "
      "SymInt first_query=0, SymInt first_key=0) -> Tensor",
      deterministic);
}

} // namespace wmha
