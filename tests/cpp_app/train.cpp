// A C++ program that takes a TransformerStack over from Python, trains it and hands it back.
//
//   cpp_train FOLDER
//
// Reads FOLDER/python_stack.pt and python_example.pt, which stack.py has made; writes FOLDER/cpp_stack.pt and
// cpp_example.pt, which it checks. Exits with 0 if all numbers agree, else with 1.
#include <torch/nn/functional/loss.h>
#include <torch/optim/adam.h>
#include <torch/serialize.h>
#include <wmha/wmha.h>

#include <cstdio>
#include <string>
#include <vector>

#include "report.h"

namespace {

/// The options of stack.py.
wmha::nn::TransformerStackOptions stack_options() {
  const auto attention = wmha::nn::MultiheadAttentionOptions(32, 4)
                             .num_kv_heads(2)
                             .causal(true)
                             .softcap(20)
                             .learned_temperature("per_head")
                             .dropout(0.1);
  const auto layer = wmha::nn::TransformerLayerOptions(attention).dim_feedforward(48).activation("swiglu").dropout(0.1);
  const std::vector<wmha::nn::Window> windows{{8, 0}, {-1, -1}};
  return wmha::nn::TransformerStackOptions(2, layer).windows(windows).final_norm(true);
}

at::Tensor flat(const wmha::nn::TransformerStack& stack) {
  std::vector<at::Tensor> parameters;
  for (const at::Tensor& parameter : stack->parameters()) parameters.push_back(parameter.detach().flatten());
  return torch::cat(parameters);
}

void train(wmha::nn::TransformerStack& stack, const at::Tensor& input, const at::Tensor& target) {
  torch::optim::Adam optimizer(stack->parameters(), torch::optim::AdamOptions(1e-3));
  stack->train();
  torch::manual_seed(1); // of the dropout masks
  for (int step = 0; step < 5; ++step) {
    optimizer.zero_grad();
    torch::nn::functional::mse_loss(stack(input), target).backward();
    optimizer.step();
  }
  stack->eval();
}

bool run(const std::string& folder) {
  torch::serialize::InputArchive example;
  example.load_from(folder + "/python_example.pt");
  at::Tensor input, output, target, trained_output;
  example.read("input", input, /*is_buffer=*/true);
  example.read("output", output, /*is_buffer=*/true);
  example.read("target", target, /*is_buffer=*/true);
  example.read("trained_output", trained_output, /*is_buffer=*/true);

  torch::manual_seed(0);
  wmha::nn::TransformerStack stack(stack_options());
  const at::Tensor initial = flat(stack);
  torch::load(stack, folder + "/python_stack.pt");
  bool agrees = report("initial parameters from the same seed", initial, flat(stack));
  stack->eval();
  agrees = report("stack from Python", stack(input), output) && agrees;
  train(stack, input, target);
  agrees = report("training in C++ and in Python", stack(input), trained_output) && agrees;

  torch::save(stack, folder + "/cpp_stack.pt");
  torch::serialize::OutputArchive result;
  result.write("output", stack(input).detach(), /*is_buffer=*/true);
  result.save_to(folder + "/cpp_example.pt");
  return agrees;
}

} // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s FOLDER\n", argv[0]);
    return 2;
  }
  try {
    return run(argv[1]) ? 0 : 1;
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what_without_backtrace());
  } catch (const std::exception& error) { std::fprintf(stderr, "error: %s\n", error.what()); }
  return 1;
}
