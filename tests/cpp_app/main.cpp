// A C++ program that uses wmha in its three ways: the C++ API with gradients, a TorchScript model, an AOTInductor
// package.
//
//   cpp_app MODEL.pt MODEL.pt2 EXAMPLE.pt
//
//   MODEL.pt    a TorchScript model that takes one tensor (of any dtype, int64 tokens too) and returns one tensor;
//               - leaves it out
//   MODEL.pt2   the same model as an AOTInductor package; - leaves it out
//   EXAMPLE.pt  a TorchScript module with the buffers `input` and `output`: what goes in and what has to come out
//
// Exits with 0 if all that ran agrees, with 1 if something differs or fails, with 2 if the arguments are wrong.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>
#include <wmha/wmha.h>

#include <cstdio>
#include <string>

#include "report.h"

namespace {

/// Trains nothing, but does what training does: the gradient of a loss through attention with a learned temperature,
/// compared with the change of the loss along one direction.
bool api_has_gradients() {
  torch::manual_seed(1);
  const auto fp64 = torch::dtype(torch::kDouble);
  const auto random = [&](at::IntArrayRef shape) { return torch::randn(shape, fp64); };
  const at::Tensor query = random({2, 4, 100, 16}); // (B, Hq, Nq, Dk)
  const at::Tensor key = random({2, 2, 100, 16});   // (B, Hkv, Nk, Dk): two query heads share each key head
  const at::Tensor value = random({2, 2, 100, 8});  // (B, Hkv, Nk, Dv)
  const at::Tensor temperature = torch::full({4}, 0.8, fp64).requires_grad_(); // one for each head
  query.requires_grad_();

  const auto loss = [&](const at::Tensor& query, const at::Tensor& temperature) {
    const auto options = wmha::AttentionOptions().window(16, 0).softcap(30).temperature(temperature);
    return wmha::attention(query, key, value, options).square().sum();
  };
  loss(query, temperature).backward();

  const at::Tensor query_step = 1e-5 * torch::randn_like(query);
  const at::Tensor temperature_step = 1e-5 * torch::randn_like(temperature);
  const at::Tensor predicted = 2 * ((query.grad() * query_step).sum() + (temperature.grad() * temperature_step).sum());
  torch::NoGradGuard no_grad;
  const at::Tensor measured = loss(query + query_step, temperature + temperature_step) -
                              loss(query - query_step, temperature - temperature_step);
  return report("gradients through the C++ API", predicted, measured);
}

bool script_agrees(const std::string& path, const at::Tensor& input, const at::Tensor& expected) {
  torch::jit::Module model = torch::jit::load(path);
  model.eval();
  torch::NoGradGuard no_grad;
  bool agrees = true;
  // The first runs record what the optimiser changes the later ones by, so one run would not show much.
  for (int run = 0; run < 4; ++run) {
    const at::Tensor output = model.forward({input}).toTensor();
    agrees = report(("TorchScript model, run " + std::to_string(run + 1)).c_str(), output, expected) && agrees;
  }
  return agrees;
}

bool package_agrees(const std::string& path, const at::Tensor& input, const at::Tensor& expected) {
  torch::inductor::AOTIModelPackageLoader model(path);
  torch::NoGradGuard no_grad;
  return report("AOTInductor package", model.run({input}).at(0), expected);
}

int run(const std::string& script, const std::string& package, const std::string& example_path) {
  bool agrees = api_has_gradients();
  const torch::jit::Module example = torch::jit::load(example_path);
  const at::Tensor input = example.attr("input").toTensor();
  const at::Tensor expected = example.attr("output").toTensor();
  if (script != "-") agrees = script_agrees(script, input, expected) && agrees;
  if (package != "-") agrees = package_agrees(package, input, expected) && agrees;
  return agrees ? 0 : 1;
}

} // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(
        stderr,
        "usage: %s MODEL.pt MODEL.pt2 EXAMPLE.pt\n"
        "  MODEL.pt    a TorchScript model of one tensor, or - to leave it out\n"
        "  MODEL.pt2   the same as an AOTInductor package, or - to leave it out\n"
        "  EXAMPLE.pt  a TorchScript module with the buffers `input` and `output` that the models have to agree with\n",
        argv[0]);
    return 2;
  }
  try {
    return run(argv[1], argv[2], argv[3]);
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what_without_backtrace());
  } catch (const std::exception& error) { std::fprintf(stderr, "error: %s\n", error.what()); }
  return 1;
}
