-- Charges one request to all that pay for it, or to none where one of them is over its limit. The same arithmetic as `rate` and `ledger`
-- of the balancer, by Redis' own clock, so the balancers' clocks do not matter.
--
-- KEYS: for each payer, a hash of its buckets and a sorted set of its streams.
-- ARGV: the stream's name ('' for none), its longest life in ms, and for each payer
--       rate a second, burst and cost of requests; the same of tokens; most streams. A burst or most of 0 is no limit.
-- Returns which payer is over (1, 2, ...; 0 for none), of what (1 requests, 2 tokens, 3 streams), the wait in ms, and then for each payer
-- what is used of its requests and tokens, in thousandths.
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
local stream, life_ms = ARGV[1], tonumber(ARGV[2])
local payers, answer = {}, { 0, 0, 0 }

local function bucket(used, at, rate, burst, cost)
  local drained = math.max(0, (tonumber(used) or 0) - math.max(0, now - (tonumber(at) or now)) * rate)
  return { used = drained, rate = rate, burst = burst, cost = math.min(cost, burst) }
end

for i = 1, #KEYS / 2 do
  local at = 2 + (i - 1) * 7
  local number = function(n) return tonumber(ARGV[at + n]) end
  local kept = redis.call('HMGET', KEYS[2 * i - 1], 'r', 'ra', 't', 'ta')
  local payer = {
    buckets = {
      bucket(kept[1], kept[2], number(1), number(2), number(3)),
      bucket(kept[3], kept[4], number(4), number(5), number(6)),
    },
    streams_max = number(7),
  }
  for kind, b in ipairs(payer.buckets) do
    local over = b.used + b.cost - b.burst
    if answer[1] == 0 and b.burst > 0 and b.cost > 0 and over > 0.000001 then
      answer = { i, kind, math.ceil(over / b.rate * 1000) }
    end
  end
  if answer[1] == 0 and stream ~= '' and payer.streams_max > 0 then
    redis.call('ZREMRANGEBYSCORE', KEYS[2 * i], '-inf', now * 1000)
    if redis.call('ZCARD', KEYS[2 * i]) >= payer.streams_max then answer = { i, 3, 1000 } end
  end
  payers[i] = payer
end

for i, payer in ipairs(payers) do
  local requests, tokens = payer.buckets[1], payer.buckets[2]
  if answer[1] == 0 then
    local life = 1
    for _, b in ipairs(payer.buckets) do
      if b.burst > 0 then
        b.used = b.used + b.cost
        life = math.max(life, b.used / b.rate)
      end
    end
    redis.call('HSET', KEYS[2 * i - 1], 'r', requests.used, 'ra', now, 't', tokens.used, 'ta', now)
    redis.call('PEXPIRE', KEYS[2 * i - 1], math.ceil(life * 1000) + 1000)
    if stream ~= '' and payer.streams_max > 0 then
      redis.call('ZADD', KEYS[2 * i], now * 1000 + life_ms, stream)
      redis.call('PEXPIRE', KEYS[2 * i], life_ms)
    end
  end
  answer[#answer + 1] = math.floor(requests.used * 1000)
  answer[#answer + 1] = math.floor(tokens.used * 1000)
end
return answer
