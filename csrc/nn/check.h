// Checks of the modules' options: the sentences of Python's wmha.nn.
#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace wmha::nn {

inline void check_positive(const char* name, int64_t size) {
  TORCH_CHECK_VALUE(size >= 1, "wmha: ", name, " must be at least 1, got ", size);
}

inline void check_probability(const char* name, double value) {
  TORCH_CHECK_VALUE(value >= 0 && value <= 1, "wmha: ", name, " must be between 0 and 1, got ", value);
}

inline void check_choice(const char* name, const std::string& value, const std::vector<std::string>& choices) {
  std::string list;
  for (const std::string& choice : choices) list += (list.empty() ? "" : ", ") + choice;
  TORCH_CHECK_VALUE(
      std::find(choices.begin(), choices.end(), value) != choices.end(), "wmha: ", name, " must be one of ", list,
      ", got ", value);
}

} // namespace wmha::nn
