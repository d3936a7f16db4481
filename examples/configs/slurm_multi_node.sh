#!/bin/bash
# Pre-training on several nodes of a SLURM cluster, one launcher per node, one process per GPU:
#   DATA=/data sbatch examples/configs/slurm_multi_node.sh
# from the root of the repository, in an environment where the project is installed. Options behind the script's name
# replace those below: sbatch examples/configs/slurm_multi_node.sh --max_steps 1000
#
# It never ran on GPUs or under SLURM, which its authors do not have. What is tested is that two "nodes" on one machine,
# started by it with a stand-in for srun, train together on CPUs.
#
#SBATCH --job-name=trips-pretraining
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1       # the launcher, which starts a process per GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue                 # killed or out of time: it goes on from the last whole checkpoint
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
DATA=${DATA:?the folder of the tar shards}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/pretraining}  # on a file system that all nodes share
# Each GPU has the whole model (ddp.yaml), which is fastest for models of this size. Others: fsdp2.yaml, zero2.yaml.
CONFIG=${CONFIG:-examples/configs/ddp.yaml}

export MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / GPUS_PER_NODE))

RESUME=()
if compgen -G "$OUTPUT_DIR/checkpoint-*/trainer_state.json" > /dev/null; then
    RESUME=(--resume_from_checkpoint last)
fi

# 4 nodes of 8 GPUs make batches of 512, and 234,000 steps 30 epochs of 4 million pairs.
# SLURM_NODEID is known on the nodes only: hence the inner shell.
srun bash -c 'accelerate launch \
    --config_file "$0" \
    --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * '"$GPUS_PER_NODE"')) \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_ADDRESS" --main_process_port "$MAIN_PORT" \
    --rdzv_backend static --max_restarts 0 \
    examples/run_pretraining.py "$@"' \
    "$CONFIG" \
    --train_shards "$DATA/coco-{00..59}.tar" "$DATA/vg-{00..99}.tar" "$DATA/cc3m-{000..331}.tar" "$DATA/sbu-{00..82}.tar" \
    --do_eval False \
    --vision_model_name_or_path openai/clip-vit-base-patch16 --text_model_name_or_path bert-base-uncased \
    --image_size 256 --schedule 5:text:0.7,10:text:0.7 \
    --per_device_train_batch_size 16 --max_steps 234000 --warmup_steps 1000 \
    --learning_rate 1e-4 --tower_learning_rate 1e-5 1e-4 --weight_decay 0.02 \
    --ddp_find_unused_parameters False --dataloader_num_workers 8 \
    --logging_steps 50 --save_steps 1000 --output_dir "$OUTPUT_DIR" \
    "${RESUME[@]}" "$@"
