-- Give a lease up; see Store.release.
-- KEYS[1]: as in claim. ARGV: holder. Returns 1 if it was held by it.
local held = redis.call('GET', KEYS[1])
if held and string.match(held, '^%d+ (.*)$') == ARGV[1] then
  redis.call('DEL', KEYS[1])
  return 1
end
return 0
