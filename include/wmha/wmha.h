// All of wmha's public C++ API.
#pragma once

#include <wmha/attention.h>
#include <wmha/nn.h>
