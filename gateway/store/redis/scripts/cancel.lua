-- Limits.cancel. KEYS: as for admit. ARGV: lease member, reserved, plan. Answers 1 or 0.
-- include: settlement
local now = clock()
local outcome = settle(cmsgpack.unpack(ARGV[2]), {0, 0, 0, 0, 0}, cmsgpack.unpack(ARGV[3]), now)
if outcome == 0 then bury(KEYS[1], now) end
return math.max(outcome, 0)
