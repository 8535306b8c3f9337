
-- For a cli_filter.lua of your own: keep this file under another name, load it with dofile, and call mig_hook.pre_submit
-- first; what it returns, unless it is slurm.SUCCESS, is yours to return.
mig_hook = {}

-- srun asks for a job and then, with the same words, for a step in it: Slurm must see the counts both times. sbatch and
-- salloc leave that to job_submit.lua.
function mig_hook.pre_submit(options)
    if options["type"] ~= "srun" then return slurm.SUCCESS end
    local asked, _, others, prefix, wrong = mig.read(options["gres"])
    if not wrong and #asked > 0 and #mig.words(options["comment"]) > 0 then wrong = mig.reserved end
    if wrong then
        slurm.log_error("%s", wrong)
        return slurm.ERROR
    end
    if #asked > 0 then
        options["gres"] = mig.write(asked, others, prefix)
        -- In a job it is a step's; a step has no comment.
        if not os.getenv("SLURM_JOB_ID") then options["comment"] = mig.comment(asked, options["comment"]) end
    end
    return slurm.SUCCESS
end

function slurm_cli_setup_defaults(options, early)
    return slurm.SUCCESS
end

function slurm_cli_pre_submit(options, offset)
    return mig_hook.pre_submit(options)
end

function slurm_cli_post_submit(offset, job, step)
    return slurm.SUCCESS
end
