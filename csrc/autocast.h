// Whether autocast would touch the operators inside a composition.
#pragma once

#include <c10/core/DeviceType.h>

namespace wmha {

/// Is autocast on, or has it just cast an operator's inputs and called it with autocast off? torch.func may turn it on
/// again before the operators inside a composition run.
bool is_inside_autocast(c10::DeviceType device);

} // namespace wmha
