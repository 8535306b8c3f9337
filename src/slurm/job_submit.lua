
-- For a job_submit.lua of your own: keep this file under another name, load it with dofile, and call mig_hook.submit and
-- mig_hook.modify first; what they return, unless it is slurm.SUCCESS, is yours to return.
mig_hook = {}

-- "Invalid generic resource (gres) specification", which not every release names.
local invalid = slurm.ESLURM_INVALID_GRES or 2072

local function refuse(why)
    slurm.log_user("%s", why)
    return invalid
end

-- Slices are counted for each node. Asked for in another way they would not be seen here.
local function elsewhere(desc)
    for _, field in ipairs({"tres_per_job", "tres_per_socket", "tres_per_task"}) do
        local asked, counts, _, _, wrong = mig.read(desc[field])
        if wrong or #asked > 0 or next(counts) then return true end
    end
    return false
end

function mig_hook.submit(desc)
    if elsewhere(desc) then
        return refuse("mig: slices are asked for by the node: --gres=mig:PROFILE, not for a task, a socket or the whole job")
    end
    local asked, counts, others, prefix, wrong = mig.read(desc.tres_per_node)
    local words = mig.words(desc.comment)
    if wrong then return refuse(wrong) end
    if #asked > 0 then
        if next(counts) then return refuse("mig: " .. table.concat(order, ", ") .. " follow from mig:PROFILE; leave them out") end
        if #words > 0 then return refuse(mig.reserved) end
        desc.comment = mig.comment(asked, desc.comment)
        desc.tres_per_node = mig.write(asked, others, prefix)
    elseif next(counts) then
        -- srun with cli_filter.lua has counted them already.
        local requested = #words == 1 and mig.requested(string.sub(words[1], 5))
        if not requested or not mig.same(mig.cost(requested), counts) then
            return refuse("mig: ask for slices with --gres=mig:PROFILE; profiles are " .. profiles)
        end
    elseif #words > 0 then
        return refuse(mig.reserved)
    end
    return slurm.SUCCESS
end

-- What a job has asked for stays: it may be running with it.
function mig_hook.modify(desc, job)
    if desc.comment ~= nil and table.concat(mig.words(desc.comment), " ") ~= table.concat(mig.words(job.comment), " ") then
        return refuse("mig: the word mig=… of a job's comment stays as it is; keep it in front of yours")
    end
    local asked, counts, _, _, wrong = mig.read(desc.tres_per_node)
    local _, before = mig.read(job.tres_per_node)
    local changed = desc.tres_per_node ~= nil and not mig.same(counts, before)
    if elsewhere(desc) or wrong or #asked > 0 or changed then
        return refuse("mig: the slices of a job can't be changed; submit it again")
    end
    return slurm.SUCCESS
end

function slurm_job_submit(desc, partitions, uid)
    return mig_hook.submit(desc)
end

function slurm_job_modify(desc, job, partitions, uid)
    return mig_hook.modify(desc, job)
end
