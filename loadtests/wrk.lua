-- Several request bodies in turn, for wrk. Run as: wrk ... -s wrk.lua URL -- BODY_FILE...
-- Prints one line of JSON with the fields of loadtests.requests.Result.
local messages = {}
local turn = 0

function init(paths)
  local headers = {["content-type"] = "application/json", ["authorization"] = "Bearer sk-bench-not-a-secret"}
  for _, path in ipairs(paths) do
    local file = assert(io.open(path, "rb"))
    messages[#messages + 1] = wrk.format("POST", "/v1/chat/completions", headers, file:read("*a"))
    file:close()
  end
end

function request()
  turn = turn % #messages + 1
  return messages[turn]
end

function done(summary, latency)
  local e = summary.errors
  local bad = e.connect + e.read + e.write + e.status + e.timeout
  local seconds = summary.duration / 1e6
  local good = summary.requests - e.status
  io.write(string.format(
    '{"requests": %d, "errors": %d, "seconds": %.4f, "per_second": %.1f, "p50_ms": %.4f, "p99_ms": %.4f}\n',
    good, bad, seconds, good / seconds, latency:percentile(50) / 1000, latency:percentile(99) / 1000))
end
