"""Seeded damage: to bytes, to JSON, to tensors, to the state of an optimizer."""

import copy
import json
import math

import torch


def bytes_changed(data, draw):
    """A flipped bit, a cut, an insertion, two swapped ranges or a zeroed one."""
    data, at, length = bytearray(data), draw.randrange(len(data)), draw.randrange(1, 40)
    other = draw.randrange(len(data))
    match draw.randrange(6):
        case 0 | 1:
            data[at] ^= 1 << draw.randrange(8)
        case 2:
            del data[at:]
        case 3:
            data[at:at] = draw.randbytes(length)
        case 4:
            first, second = sorted((at, other))
            length = min(length, second - first, len(data) - second)
            a, b = data[first : first + length], data[second : second + length]
            data[first : first + length], data[second : second + length] = b, a
        case _:
            data[at : at + length] = bytes(len(data[at : at + length]))
    return bytes(data)


VALUES = [
    None,
    True,
    False,
    -1,
    0,
    1,
    7,
    0.5,
    1.0,
    1e308,
    math.nan,
    math.inf,
    10**30,
    "",
    "x",
    "0.9",
    [],
    {},
    [[]],
    [1],
]


def json_changed(data, draw):
    """Returns text of JSON with a value of another type, a key gone or renamed, or one that is there twice."""
    data = copy.deepcopy(data)
    places = []

    def walk(value):
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(data)
    holder, key = draw.choice(places)
    match draw.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[key + "_"] = holder.pop(key)
        case 2:
            return json.dumps(draw.choice(VALUES))
        case 3 if isinstance(holder, dict):
            return json.dumps(data).replace(f'"{key}":', f'"{key}": 1, "{key}":', 1)
        case _:
            holder[key] = draw.choice(VALUES)
    return json.dumps(data)


def tensors_changed(tensors, draw, finite):
    """A tensor of another dtype, shape or name, one less or more, or, unless `finite`, with NaN."""
    tensors, name = dict(tensors), draw.choice(sorted(tensors))
    tensor = tensors[name]
    match draw.randrange(7):
        case 0:
            tensors[name] = tensor.to(
                draw.choice([torch.int32, torch.int64, torch.bool, torch.complex64, torch.uint8])
            )
        case 1:
            tensors[name] = tensor.to(draw.choice([torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn]))
        case 2:
            tensors[name] = tensor.reshape(1, *tensor.shape)
        case 3:
            tensors[name] = torch.cat([tensor.reshape(-1), tensor.reshape(-1)[:1]])
        case 4:
            del tensors[name]
        case 5:
            tensors[name + "_"] = tensors.pop(name)
        case _:
            if tensor.is_floating_point() and tensor.numel() and not finite:
                bad = tensor.clone().reshape(-1)
                bad[draw.randrange(bad.numel())] = math.nan
                tensors[name] = bad.reshape(tensor.shape)
            else:
                tensors[f"further.{name}"] = tensor.clone()
    return tensors


def state_changed(state, draw):
    """A state dict with one entry of another type, shape, dtype or with NaN, gone, or renamed."""
    state, places = copy.deepcopy(state), []

    def walk(value):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk({"whole": state})
    holder, key = draw.choice(places[1:])
    value = holder[key]
    if torch.is_tensor(value):
        bad = torch.full_like(value, math.nan) if value.is_floating_point() else value + 1
        holder[key] = draw.choice([bad, value.reshape(1, -1, 1), value.int(), None, "x", torch.zeros(0)])
    elif draw.random() < 0.3:
        del holder[key]
    else:
        holder[key] = draw.choice(VALUES)
    return state
