local mig = {}

-- The slices that generic resources ask for, counts of ours among them, the other ones as they are, and how each begins
-- ("gres:" before Slurm 23.11, "gres/" since, nothing as a user types it). The last value says what is wrong.
function mig.read(text)
    local asked, counts, others, prefix, wrong = {}, {}, {}, nil, nil
    for entry in string.gmatch(text or "", "[^,]+") do
        local start, body = string.match(entry, "^(gres[:/])(.*)$")
        body = body or entry
        prefix = prefix or start or ""
        local name, rest = string.match(body, "^([^:=]+)(.*)$")
        if name == "mig" then
            local profile, number = string.match(rest, "^:([^:=]+)[:=]?(%d*)$")
            number = number == "" and 1 or tonumber(number)
            if not profile or string.match(profile, "^%d+$") then
                wrong = wrong or "mig: say which slice, as in --gres=mig:PROFILE or mig:PROFILE:2; profiles are " .. profiles
            elseif not costs[profile] then
                wrong = wrong or "mig: no profile " .. profile .. " in this cluster; profiles are " .. profiles
            elseif number < 1 or number > 64 then
                wrong = wrong or "mig: a job gets 1 to 64 slices of a profile, not " .. number
            else
                table.insert(asked, {profile = profile, number = number})
            end
        elseif kinds[name] then
            counts[name] = (counts[name] or 0) + (tonumber(string.match(rest, "^[:=](%d+)$")) or 1)
        else
            table.insert(others, entry)
        end
    end
    return asked, counts, others, prefix, wrong
end

-- What slices count as, together.
function mig.cost(asked)
    local sum = {}
    for _, want in ipairs(asked) do
        for kind, number in pairs(costs[want.profile]) do
            sum[kind] = (sum[kind] or 0) + want.number * number
        end
    end
    return sum
end

-- Slices as they are written in a comment: "2x1g.10gb,3g.40gb".
function mig.request(asked)
    local parts = {}
    for _, want in ipairs(asked) do
        table.insert(parts, (want.number > 1 and want.number .. "x" or "") .. want.profile)
    end
    return table.concat(parts, ",")
end

-- The same read back; nil where it is not what mig.request writes.
function mig.requested(text)
    local asked = {}
    for part in string.gmatch(text, "[^,]+") do
        local number, profile = string.match(part, "^(%d+)x(.+)$")
        profile = profile or part
        if not costs[profile] then return nil end
        table.insert(asked, {profile = profile, number = tonumber(number or 1)})
    end
    return asked
end

-- Generic resources with slices as counts.
function mig.write(asked, others, prefix)
    local entries, sum = {}, mig.cost(asked)
    for _, entry in ipairs(others) do table.insert(entries, entry) end
    for _, kind in ipairs(order) do
        if sum[kind] then table.insert(entries, prefix .. kind .. ":" .. sum[kind]) end
    end
    return table.concat(entries, ",")
end

-- The words of a comment that ask for slices.
function mig.words(comment)
    local words = {}
    for word in string.gmatch(comment or "", "[^%s;]+") do
        if string.sub(word, 1, 4) == "mig=" then table.insert(words, word) end
    end
    return words
end

-- A comment that asks for slices, the user's own behind it.
function mig.comment(asked, comment)
    local own = comment and comment ~= "" and " " .. comment or ""
    return "mig=" .. mig.request(asked) .. own
end

-- Whether two tables of counts are the same.
function mig.same(one, other)
    for _, kind in ipairs(order) do
        if (one[kind] or 0) ~= (other[kind] or 0) then return false end
    end
    return true
end

mig.reserved = "mig: a comment has no word mig=… of your own: slices are asked for with --gres=mig:PROFILE"
