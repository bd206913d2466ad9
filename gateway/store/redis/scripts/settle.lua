-- Limits.settle. KEYS: as for admit. ARGV: lease member, reserved, used, plan. Answers 1 or 0.
-- include: settlement
local reserved, used = cmsgpack.unpack(ARGV[2]), cmsgpack.unpack(ARGV[3])
return math.max(settle(reserved, used, cmsgpack.unpack(ARGV[4]), clock()), 0)
